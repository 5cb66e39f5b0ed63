"""Dropout and linear on CPU, faster than torch's.

Dropout takes a third of the time of torch's, whose `bernoulli` draws one slow number per element. Here one 64-bit word
serves four elements (document_keys.py), computed in blocks that stay in the cache. Each compares its 16 bits with a
bound, and the result becomes a mask of all ones or all zeros, which is AND-ed with the bits of the input. Kept elements
are divided by the rounded keep probability, so the expectation is exact; torch's bf16 mask rounds that factor to 8
bits, an error of 0.16% at p = 0.1. The mask does not depend on the number of threads.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from isotune.compat.torch import (
    AutogradFunction,
    has_onednn_bf16_linear,
    has_onednn_linear,
    onednn_linear,
    replaced,
)
from isotune.models.document_keys import (
    ELEMENTS_PER_WORD,
    RESOLUTION,
    draw_call_key,
    mixed,
    quantised_drop,
    required_documents,
    word_steps,
)

WORDS_PER_BLOCK = 2**15  # 256 KiB, and as much to compute them: both fit a core's second cache
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_stock_linear = functional.linear


def onednn_products() -> contextlib.AbstractContextManager[None]:
    """Within it, with gradients off, `torch.nn.functional.linear` of fp32 on CPU is oneDNN's, where torch has oneDNN.

    On an AMD EPYC with AVX-512, torch's `linear` (MKL 2024.2) reaches 100 GFLOP/s on one core and oneDNN 220; on other
    processors the two are alike. They sum in different orders, so results differ by rounding. Training keeps torch's,
    because its losses are promised bit for bit.
    """
    return replaced("linear", _functional_linear) if has_onednn_linear() else contextlib.nullcontext()


def dropout(input: torch.Tensor, p: float) -> torch.Tensor:
    """Set elements of a floating-point CPU tensor to zero with probability `p` and divide the others by 1 - `p`.

    `p` is rounded to 1/65536; at 0 the input itself is returned, at 1 all elements are zero.
    """
    threshold, scale = quantised_drop(p)
    if threshold == 0:
        return input
    return _Dropout.apply(input, threshold, scale)


def draw_kept(line_keys: np.ndarray, features: int, threshold: int) -> torch.Tensor:
    """Which elements are kept, bool [lines, features], true with probability 1 - threshold / 65536.

    `line_keys` are uint64 [lines].
    """
    steps = word_steps(features)
    # whole words, for lines without gaps are compared at once
    kept = torch.empty(len(line_keys), ELEMENTS_PER_WORD * len(steps), dtype=torch.bool)
    found = kept.numpy()
    per_block = max(1, WORDS_PER_BLOCK // max(1, len(steps)))
    words, spare = np.empty((2, min(per_block, len(kept)), len(steps)), np.uint64)
    numbers = words.view("<i2")
    for start in range(0, len(kept), per_block):
        keys = line_keys[start : start + per_block]
        mixed(keys, steps, words[: len(keys)], spare[: len(keys)])
        # as signed numbers, like the bound: one comparison of 16 bits
        np.greater_equal(numbers[: len(keys)], threshold - RESOLUTION // 2, out=found[start : start + per_block])
    return kept[:, :features]


def as_mask(kept: torch.Tensor) -> torch.Tensor:
    """The int8 mask of a bool tensor: -1 (all ones in binary) where an element is kept, 0 where it is dropped."""
    return kept.view(torch.int8).neg()


def pack_kept(kept: torch.Tensor) -> torch.Tensor:
    """A bool tensor of any shape with one bit per element, uint8 [elements / 8]: an eighth of the mask, to save it.

    Packing and unpacking take a third of the time of drawing it again.
    """
    return torch.from_numpy(np.packbits(kept.numpy())).clone()


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The int8 mask of a bool tensor that `pack_kept` packed."""
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=math.prod(shape)))
    return as_mask(bits.view(torch.bool).view(tuple(shape)))


def draw_call(shape: Sequence[int], threshold: int) -> torch.Tensor:
    """What one dropout call keeps of a tensor of this shape, bool; it needs `known_documents`."""
    return draw_kept(required_documents().line_keys(shape, draw_call_key()), shape[-1], threshold).view(tuple(shape))


def masked(input: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`input` where `mask` keeps it and +0.0 elsewhere, a new contiguous tensor, not scaled; without a mask itself."""
    if mask is None:
        return input
    bits = _INTEGER_OF_SIZE[input.element_size()]
    result = mask.to(bits, memory_format=torch.contiguous_format)  # in whose memory the result goes: no other pages
    return torch.bitwise_and(input.contiguous().view(bits), result, out=result).view(input.dtype)


class Workspace:
    """Memory on CPU for one tensor at a time, used again: new blocks of many megabytes are fresh pages every time."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; it overwrites the previous one."""
        elements = math.prod(shape)
        if self.buffer.dtype != dtype or self.buffer.numel() < elements:
            self.buffer = torch.empty(0)  # freed before the larger one is made: both are tens of megabytes
            self.buffer = torch.empty(elements, dtype=dtype)
        return self.buffer[:elements].view(*shape)


class _Dropout(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
        ctx.scale = scale
        kept = draw_call(input.shape, threshold)
        ctx.packed = pack_kept(kept)
        return masked(input, as_mask(kept)).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return masked(grad, unpack_mask(ctx.packed, grad.shape)).mul_(ctx.scale), None, None


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear` on CPU; in bf16 with a bias, the same bits in 10% less time.

    torch fills the result with the bias and adds the product to it; oneDNN adds the bias as it writes the product.
    """
    same_bits = bias is not None and rows.dtype == torch.bfloat16 and rows.is_contiguous()  # else torch rounds twice
    if not same_bits or not has_onednn_bf16_linear():
        return functional.linear(rows, weight, bias)
    return onednn_linear(rows, weight, bias)


def _functional_linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    applies = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    plain = all(
        type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32
        for t in (input, weight, bias)
        if t is not None
    )
    if not applies or not plain or input.numel() == 0 or weight.dim() != 2 or not weight.is_contiguous():
        return _stock_linear(input, weight, bias)
    # an input that is not contiguous would run through a scalar loop, 200 times slower
    return onednn_linear(input.contiguous(), weight, bias)
