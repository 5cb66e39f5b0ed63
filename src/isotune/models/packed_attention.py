"""One attention function, `packed`, under which documents of a row cannot see each other in any architecture.

A packed microbatch is one row without padding, and a model's own mask does not say where a document ends: OPT builds
its causal mask without position_ids and leaks by several standard deviations of the logits. So `packed` reads the
bounds from transformers' own FlashAttentionKwargs and attends span by span:

    input_ids       [ a0 a1 a2 | b0 b1 | c0 c1 c2 c3 ]        position_ids  [ 0 1 2 | 0 1 | 0 1 2 3 ]
    cu_seq_lens_q   [ 0, 3, 5, 9 ]                            max_length_q  4

    a0  #              each token sees `#`: its own document, and in a causal
    a1  ##             model only what stands before it
    a2  ###
    b0     #
    b1     ##
    c0       #
    ...

Importing this module registers the function. Without bounds (generation, a padded batch) it is transformers' sdpa.
"""

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from isotune.io.errors import UserError
from isotune.models.cpu.document_attention import document_attention

PACKED = "packed"
FLASH_ATTENTION = "flash_attn_varlen"
TORCH_VARLEN = "torch_varlen"
DOCUMENT_SDPA = "per_document_sdpa"
DOCUMENT_PRODUCTS = "per_document_products"
KEEP_WEIGHTS = "keep_attention_weights"  # an attention module that has it true trades memory for time on CPU

# RoBERTa's family counts positions from padding_idx + 1, a habit of fairseq.
POSITIONS_AFTER_PADDING = frozenset(
    {"camembert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"}
)


def kernel_in_effect(device: torch.device | str, dtype: torch.dtype, dropout: float = 0.0, head_size: int = 64) -> str:
    """Which kernel `packed` runs, for RUN/environment.json.

    Args:
        device, dtype: of query, key and value; under autocast, its type.
        dropout: of attention weights while training; torch's varlen kernel has none.
        head_size: features of a head; the varlen kernels take multiples of 8 up to 256.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return DOCUMENT_PRODUCTS
    fits = dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    if device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0):
        if _flash_attention() is not None:
            return FLASH_ATTENTION
        if dropout == 0.0 and _torch_varlen_options() is not None:
            return TORCH_VARLEN
    return DOCUMENT_SDPA


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function behind `attn_implementation="packed"`, with the signature of transformers' AttentionInterface.

    Args:
        module: the attention module; its `is_causal` decides where the argument is None.
        query: [1, heads, tokens, head_size]; key, value: [1, key_heads, tokens, head_size].
        attention_mask: None in a packed row; what `packed_mask` made where there are no bounds.
        scaling: multiplies the scores; 1 / sqrt(head_size) where not given.
        dropout: probability of dropping an attention weight.
        cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], the same bounds; None calls transformers' sdpa.
        max_length_q, max_length_k: tokens of the longest document; counted where not given.

    Returns:
        [1, tokens, heads, head_size], and None for the attention weights.

    Raises:
        UserError: the model uses a kind of attention that `packed` does not do.
    """
    _refuse_unknown_kinds(kwargs, cu_seq_lens_q, max_length_q)
    if cu_seq_lens_q is None:
        _refuse_hidden_packing(kwargs.get("position_ids"), attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    assert attention_mask is None, "a packed row has no padding, hence no mask"
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2], "a packed microbatch is one row, without a cache"
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = kernel_in_effect(query.device, query.dtype, dropout, query.shape[-1])
    if kernel in (FLASH_ATTENTION, TORCH_VARLEN):
        longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else int(max_length_q)
        by_token = [t[0].transpose(0, 1) for t in (query, key, value)]
        run = _run_flash_attention if kernel == FLASH_ATTENTION else _run_torch_varlen
        return run(by_token, cu_seq_lens_q, longest, scale, causal, dropout)[None], None
    bounds = cu_seq_lens_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == query.shape[2], "the documents cover the row"
    if kernel == DOCUMENT_PRODUCTS and not _never_learns(query):
        keep = getattr(module, KEEP_WEIGHTS, False)
        out = document_attention(
            query, key, value, bounds, scale=scale, causal=causal, dropout=dropout, keep_weights=keep
        )
        return out, None
    outs = [
        functional.scaled_dot_product_attention(
            *(t[:, :, start:stop] for t in (query, key, value)),
            dropout_p=dropout,
            scale=scale,
            is_causal=causal,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        for start, stop in pairwise(bounds)
        if stop > start
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def packed_mask(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """No mask for a packed row; the mask of transformers' sdpa where there is padding or a cache."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)


def set_packed_attention(model: nn.Module) -> None:
    """Make `model` (or the model below a peft wrapper) attend through `packed`.

    Raises:
        UserError: the architecture does not let its attention be replaced.
    """
    base = _transformer(model)
    if base.config._attn_implementation != PACKED:
        base._attention_before_packing = base.config._attn_implementation
        base.set_attn_implementation(PACKED)
    configs = [module.config for module in base.modules() if hasattr(module, "config")]
    replaceable = getattr(base, "_supports_attention_backend", False)
    if not replaceable or any(config._attn_implementation != PACKED for config in configs):
        raise UserError(
            f"model type '{base.config.model_type}' does not let its attention be replaced, so packed documents could "
            "see each other: choose another model"
        )


def restore_attention(model: nn.Module) -> None:
    """Give `model` back the attention that it had before `set_packed_attention`."""
    base = _transformer(model)
    base.set_attn_implementation(getattr(base, "_attention_before_packing", "sdpa"))


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within it the model attends as transformers made it, for generation and padded evaluation."""
    base = _transformer(model)
    before = base.config._attn_implementation
    restore_attention(base)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def document_position_ids(config: PreTrainedConfig, cu_seq_lens: torch.Tensor) -> torch.Tensor:
    """Positions that restart in every document, counted as the model type counts them.

    Args:
        config: says where positions begin: at 0, or at padding_idx + 1 in RoBERTa's family.
        cu_seq_lens: int32 [documents + 1], from 0 to tokens.

    Returns:
        int64 [1, tokens].
    """
    first = config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0
    bounds = cu_seq_lens.long()
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
    return (torch.arange(int(bounds[-1]), device=bounds.device) - starts + first)[None]


def _never_learns(query: torch.Tensor) -> bool:
    """Whether torch's fused kernel is the faster one on CPU: in fp32, without a backward pass ever (an evaluation)."""
    return torch.is_inference_mode_enabled() and query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _transformer(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refuse_unknown_kinds(kwargs: dict[str, Any], bounds: torch.Tensor | None, longest: int | None) -> None:
    """Attention that is more than a softmax over the visible keys is refused, never silently simplified."""
    for kind in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(kind) is not None:
            raise UserError(f"this model's attention uses {kind}, which packed attention does not do: choose another")
    window = kwargs.get("sliding_window")
    if window is not None and bounds is not None:
        longest = int(bounds.diff().max()) if longest is None else longest
        if longest > window:
            raise UserError(
                f"this model's attention looks back {window} tokens and a document has {longest}: "
                f"set max_seq_length to {window} or less"
            )


def _refuse_hidden_packing(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    """A row whose positions restart but whose bounds are not given would leak: a bug of the caller."""
    if position_ids is not None and attention_mask is None and position_ids.shape[-1] > 1:
        assert not bool((position_ids.diff(dim=-1) < 0).any()), "positions restart: a packed row needs cu_seq_lens_q"


@functools.cache
def _flash_attention() -> Callable | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]  (an optional extra)
    except ImportError:  # built against another torch: the next kernel serves
        return None
    return flash_attn_varlen_func


@functools.cache
def _torch_varlen_options() -> dict[str, Any] | None:
    """Options of torch's varlen kernel in this version; None where it cannot do what `packed` needs."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = set(inspect.signature(varlen_attn).parameters)
    if not {"scale", "window_size", "enable_gqa"} <= known:
        return None
    # With split keys the order of sums depends on the longest document of the row, that is, on the neighbours.
    return {"num_splits": 1} if "num_splits" in known else {}


def _run_flash_attention(
    by_token: list[torch.Tensor], bounds: torch.Tensor, longest: int, scale: float, causal: bool, dropout: float
) -> torch.Tensor:
    kernel = _flash_attention()
    assert kernel is not None
    # its backward adds up the queries' gradients in any order unless told otherwise; torch's own kernel asks by itself
    ordered = torch.are_deterministic_algorithms_enabled()
    return kernel(
        *by_token, bounds, bounds, longest, longest, dropout, softmax_scale=scale, causal=causal, deterministic=ordered
    )


def _run_torch_varlen(
    by_token: list[torch.Tensor], bounds: torch.Tensor, longest: int, scale: float, causal: bool, dropout: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0.0
    options = _torch_varlen_options() or {}
    grouped = by_token[0].shape[1] != by_token[1].shape[1]
    window = (-1, 0) if causal else (-1, -1)
    query, key, value = by_token
    return varlen_attn(  # type: ignore[return-value]  (a tensor, as no auxiliary output is asked for)
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=window,
        enable_gqa=grouped,
        **options,
    )
