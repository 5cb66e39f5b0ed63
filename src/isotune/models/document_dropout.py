"""Dropout that belongs to the document, in every model: hold `training_microbatch` around forward and backward.

A mask depends on (seed, step, call, document) and on nothing else, so neither the microbatch, nor the neighbours in the
row, nor the number of ranks changes it (document_keys.py). Within the context `torch.nn.functional.dropout` draws such
masks, and in padded models also the attention weights of `scaled_dot_product_attention`; packed attention and the fused
LoRA layer do by themselves. Layers that are left out at random (layerdrop) are the same for all microbatches of a step.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from isotune.compat.torch import replaced
from isotune.models.cpu import functional as on_cpu
from isotune.models.cpu.layers import forget_cast
from isotune.models.cuda import dropout as on_cuda
from isotune.models.document_keys import MicrobatchDocuments, known_documents

_stock_dropout, _stock_attention = functional.dropout, functional.scaled_dot_product_attention


@contextlib.contextmanager
def training_microbatch(documents: MicrobatchDocuments) -> Iterator[None]:
    """Hold it around the forward and backward pass of the microbatch that sees these documents.

    torch's default generator must be seeded alike before every microbatch of a step.
    """
    with contextlib.ExitStack() as within:
        within.enter_context(known_documents(documents))
        within.enter_context(replaced("dropout", _dropout))
        if documents.padded:
            within.enter_context(replaced("scaled_dot_product_attention", _attention))
        within.callback(forget_cast)
        yield


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or p == 0.0:
        return _stock_dropout(input, p, training, inplace)
    drop = on_cpu.dropout if input.device.type == "cpu" else on_cuda.dropout
    result = drop(input, p)
    return input.copy_(result) if inplace else result


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's, which draws the masks of its weights for the whole batch at once; so they are dropped here."""
    if dropout_p == 0.0:
        options: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
        return _stock_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout_p) @ value
