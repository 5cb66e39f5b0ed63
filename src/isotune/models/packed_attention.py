"""Packed attention: one attention function, `packed`, that isolates the documents of a row in any architecture.

A packed microbatch is one row without padding, and a model's own mask may ignore document boundaries: OPT builds its
causal mask without position_ids, and its logits then change by several standard deviations. So `packed` takes the
boundaries from transformers' FlashAttentionKwargs and attends within each document:

    input_ids       [ a0 a1 a2 | b0 b1 | c0 c1 c2 c3 ]        position_ids  [ 0 1 2 | 0 1 | 0 1 2 3 ]
    cu_seq_lens_q   [ 0, 3, 5, 9 ]                            max_length_q  4

    a0  #              `#`: the keys that each query attends to, in a causal model;
    a1  ##             in a bidirectional one, all keys of its own document
    a2  ###
    b0     #
    b1     ##
    c0       #
    ...

Importing this module registers the function. Without boundaries (generation, padded batches) it is transformers' sdpa.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from isotune.compat.peft import base_model_of
from isotune.compat.torch import flash_varlen, has_flash_varlen
from isotune.compat.transformers import attention_of, lets_attention_be_replaced, look_for_no_documents
from isotune.io.errors import UserError
from isotune.models.attention_form import AttentionForm, whole_attention
from isotune.models.cpu.document_attention import document_attention
from isotune.models.document_keys import current_documents, draw_document_keys

PACKED = "packed"
FLASH_ATTENTION = "flash_attn_varlen"
TORCH_VARLEN = "torch_varlen"
DOCUMENT_SDPA = "per_document_sdpa"
DOCUMENT_PRODUCTS = "per_document_products"
QUERIES_AT_ONCE = 512  # of a window, where no kernel knows windows
KEEP_WEIGHTS = "keep_attention_weights"  # true on an attention module: more memory for less time on CPU

# Tensors that models pass to their attention function and that change nothing there.
KNOWN_TENSORS = frozenset({"position_ids", "cache_position", "cu_seq_lens_k"})

# RoBERTa and its relatives count positions from padding_idx + 1, as fairseq did.
POSITIONS_AFTER_PADDING = frozenset(
    {"camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"}
    | {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)


def kernel_in_effect(
    device: torch.device | str,
    dtype: torch.dtype,
    dropout: float = 0.0,
    head_size: int = 64,
    softcap: float | None = None,
    sinks: bool = False,
) -> str:
    """Name of the kernel that `packed` runs on query, key and value of this device, dtype (autocast's) and head size.

    Both varlen kernels take multiples of 8 up to 256, and windows. Neither drops attention weights by document nor has
    sinks, and torch's has no cap, so with these the documents are computed one by one.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return DOCUMENT_PRODUCTS
    fits = dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and 0 < head_size <= 256
    fits = fits and dropout == 0.0 and not sinks
    if device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0):
        if _flash_attention() is not None:
            return FLASH_ATTENTION
        if has_flash_varlen() and softcap is None:
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function behind `attn_implementation="packed"`, with the signature of transformers' AttentionInterface.

    `query` is [1, heads, tokens, head_size]; `key` and `value` are [1, key_heads, tokens, head_size]. `cu_seq_lens_q`
    and `_k` are the same boundaries, int32 [documents + 1]; without them transformers' sdpa runs, with the mask of
    `packed_mask`. Where not given, `scaling` is 1 / sqrt(head_size), `is_causal` the module's, and `max_length_q`, the
    tokens of the longest document, is computed. `sliding_window` and `softcap` are those of AttentionForm, `s_aux` are
    the sinks of whole_attention. On a GPU under autocast all inputs are cast to its dtype first, because rotary
    embeddings make fp32 of query and key. Dropped weights are the document's own, as in document_keys.py.
    Returns [1, tokens, heads, head_size], and None for the attention weights. UserError where the model uses an
    attention feature that `packed` does not support.
    """
    _check_supported(kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = AttentionForm(scale, causal, sliding_window, softcap)
    if sliding_window is not None:
        _windows.given.setdefault(id(module), set()).add(sliding_window)
    if cu_seq_lens_q is None:
        positions = kwargs.get("position_ids")
        if positions is not None and attention_mask is None and positions.shape[-1] > 1:  # else it would leak
            assert not bool((positions.diff(dim=-1) < 0).any()), "positions restart: a packed row needs cu_seq_lens_q"
        if s_aux is None and (form.is_plain(key.shape[2]) or (softcap is None and attention_mask is not None)):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scale, is_causal=is_causal, **kwargs
            )
        out = whole_attention(query, key, value, form, sinks=s_aux, mask=attention_mask, dropout=dropout)
        return out.transpose(1, 2).contiguous(), None
    assert attention_mask is None, "a packed row has no padding, hence no mask"
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2], "a packed microbatch is one row, without a cache"
    device = query.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    size = query.shape[-1] if value.shape[-1] == query.shape[-1] else 0  # the varlen kernels have one for both
    kernel = kernel_in_effect(query.device, query.dtype, dropout, size, softcap, s_aux is not None)
    _note_kernel(kernel, module.training)
    if kernel in (FLASH_ATTENTION, TORCH_VARLEN):
        longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else int(max_length_q)
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        run = _run_flash_attention if kernel == FLASH_ATTENTION else flash_varlen
        return run(q, k, v, cu_seq_lens_q, longest, form)[None], None
    bounds = _on_host(cu_seq_lens_q)
    assert bounds[0] == 0 and bounds[-1] == query.shape[2], "the documents cover the row"
    is_fp32 = query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    # in fp32 and without gradients torch's fused kernel is the faster one on CPU
    if kernel == DOCUMENT_PRODUCTS and not (is_fp32 and torch.is_inference_mode_enabled()):
        options: Any = {"sinks": s_aux, "dropout": dropout, "keep_weights": getattr(module, KEEP_WEIGHTS, False)}
        return document_attention(query, key, value, bounds, form, **options), None
    return _document_by_document(query, key, value, bounds, form, s_aux, dropout), None


def _document_by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    form: AttentionForm,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """torch's attention of one document after the other, [1, tokens, heads, head_size].

    A kernel draws the weights that it drops from the device's generator, which is seeded for each document.
    """
    lengths = [stop - start for start, stop in pairwise(bounds)]
    seeds = draw_document_keys(len(lengths)).tolist() if dropout and query.device.type == "cuda" else None
    outputs = []
    # split, and not slices: the gradient of a slice is as large as the row
    for i, document in enumerate(zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)):
        if not lengths[i]:
            continue
        if seeds is not None:
            torch.cuda.manual_seed(seeds[i])
        q, k, v = document
        if sinks is None and form.is_plain(lengths[i]):
            grouped = key.shape[1] != query.shape[1]
            output = functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=form.scale, is_causal=form.causal, enable_gqa=grouped
            )
        elif query.device.type == "cpu" and not dropout:
            output = document_attention(q, k, v, [0, lengths[i]], form, sinks=sinks).transpose(1, 2)
        else:
            output = _by_blocks(q, k, v, form, sinks, dropout)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    form: AttentionForm,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """`whole_attention` of a document, [1, heads, tokens, size], in blocks of queries, with the keys they see."""
    outputs = []
    for rows, keys in form.blocks(query.shape[2], QUERIES_AT_ONCE):
        hidden = form.hidden(rows, keys, query.device)
        if hidden is None:  # of this block: without a mask, the form would decide again
            mask = query.new_ones(rows.stop - rows.start, keys.stop - keys.start, dtype=torch.bool)
        else:
            mask = ~hidden
        block = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        outputs.append(whole_attention(*block, form, sinks=sinks, mask=mask, dropout=dropout, drops_by_device=True))
    return torch.cat(outputs, dim=2)


def packed_mask(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """The mask function: None for a packed row, the mask of transformers' sdpa where there is padding or a cache."""
    if kwargs.get("local_size"):  # 0 is no window, in configurations that switch theirs off
        _windows.asked.add(kwargs["local_size"])
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
look_for_no_documents(lambda: (documents := current_documents()) is not None and not documents.padded)


def set_packed_attention(model: nn.Module) -> None:
    """Make `model`, or the model inside a peft wrapper, use `packed`; UserError where its type does not let it."""
    base = base_model_of(model)
    base.set_attn_implementation(PACKED)
    configs = [module.config for module in base.modules() if hasattr(module, "config")]
    if not lets_attention_be_replaced(base) or any(attention_of(config) != PACKED for config in configs):
        raise UserError(
            f"model type '{base.config.model_type}' does not let its attention be replaced, so packed documents could "
            "see each other: choose another model"
        )


def document_position_ids(
    config: PreTrainedConfig, cu_seq_lens: torch.Tensor, tokens: int | None = None
) -> torch.Tensor:
    """Position ids that restart in every document: int64 [1, tokens], from int32 [documents + 1] boundaries.

    They begin at 0, or at padding_idx + 1 for RoBERTa and its relatives, as `config` says. Without `tokens`, the last
    boundary, a GPU is waited for.
    """
    bounds = cu_seq_lens.long()
    tokens = int(bounds[-1]) if tokens is None else tokens
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=tokens)
    return (torch.arange(tokens, device=bounds.device) - starts + _first_position(config))[None]


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest document that a model has position embeddings for, in tokens; None where there is no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None or positions < 1 else positions - _first_position(config)  # XLNet says -1


def _first_position(config: PreTrainedConfig) -> int:
    config = config.get_text_config()
    return config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0


def _check_supported(kwargs: dict[str, Any]) -> None:
    """Raise where a model gives its attention more tensors than this function knows, such as biases of the scores."""
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in KNOWN_TENSORS:
            raise UserError(f"this model's attention uses {name}, which packed attention lacks")


@functools.cache
def _flash_attention() -> Callable | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]  (an optional extra)
    except ImportError:  # built against another torch: use the next kernel
        return None
    return flash_attn_varlen_func


def _run_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    form: AttentionForm,
) -> torch.Tensor:
    kernel = _flash_attention()
    assert kernel is not None
    # its backward sums the queries' gradients in no fixed order otherwise; torch's own kernel reads this setting itself
    deterministic = torch.are_deterministic_algorithms_enabled()
    options: Any = {"softmax_scale": form.scale, "causal": form.causal, "deterministic": deterministic}
    if form.window is not None:
        options["window_size"] = (form.window - 1, 0 if form.causal else form.window - 1)
    if form.softcap is not None:
        options["softcap"] = form.softcap
    return kernel(query, key, value, bounds, bounds, longest, longest, **options)


@dataclass
class Windows:
    """The windows, in tokens, of a model's masks, and those that its attention modules were given."""

    asked: set[int] = field(default_factory=set[int])
    given: dict[int, set[int]] = field(default_factory=dict[int, set[int]])  # by id of the module

    def lost(self, config: PreTrainedConfig, longest: float) -> str | None:
        """The reason why a model cannot be packed: a mask has a window below `longest` tokens, and a layer lacks it.

        Masks are made for kinds of layers too that a model has none of.
        """
        kinds = getattr(config.get_text_config(), "layer_types", None)
        layers = len(self.given) if kinds is None else sum(map(_has_window, kinds))
        asked = {window for window in self.asked if window < longest}
        given = set[int]().union(*self.given.values())
        unknown = {window for window in asked if not given & {window, window + 1}}
        if kinds is not None and not layers:
            return None
        lost = asked if len(self.given) < layers else unknown
        return f"only its mask knows its window of {min(lost)} tokens" if lost else None


def _has_window(kind: str) -> bool:
    return any(word in kind for word in ("sliding", "chunked", "local", "compressed"))


_windows = Windows()


@contextlib.contextmanager
def noted_windows() -> Iterator[Windows]:
    """The windows of the forward passes within it. A mask's window or chunk that no attention is given is lost."""
    global _windows
    before, _windows = _windows, Windows()
    try:
        yield _windows
    finally:
        _windows = before


_last_kernel: str | None = None
_last_in_training: str | None = None


def _note_kernel(name: str, training: bool) -> None:
    global _last_kernel, _last_in_training
    _last_kernel, _last_in_training = name, name if training else _last_in_training


def last_kernel(*, in_training: bool = False) -> str | None:
    """Name of the kernel that the last call of `packed` with boundaries ran; None before the first.

    `in_training`: the last call of a module in training mode, which may drop attention weights.
    """
    return _last_in_training if in_training else _last_kernel


def lengths_of(bounds: torch.Tensor) -> list[int]:
    """The tokens of each document between `bounds`, int32 [documents + 1]."""
    return [stop - start for start, stop in pairwise(_on_host(bounds))]


def _on_host(bounds: torch.Tensor) -> list[int]:
    """`bounds.tolist()`; of a microbatch whose documents are known without waiting for the device that has them."""
    documents = current_documents()
    if documents is None or bounds.device.type == "cpu":
        return bounds.tolist()
    return list(accumulate(documents.lengths, initial=0))
