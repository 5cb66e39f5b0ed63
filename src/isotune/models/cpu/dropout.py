"""Dropout on CPU at a fifth of torch's cost, because `bernoulli` there draws one slow number for every element.

One 64-bit draw serves eight elements: each compares a random byte with a bound, and the result becomes a mask of all
ones or all zeros that is AND-ed onto the bits of the input. The probability is rounded to 1/32768 (0.1 becomes
0.100006). What of it a byte cannot tell is in the bound, which is one higher for a random share of the elements; 64 of
them, evenly spread over the tensor, share one bound, which correlates two of them by less than 0.0002 for
probabilities from 0.02 to 0.98. Kept elements are divided by the keep probability after rounding, so the expectation is
exact; torch's own bf16 mask rounds that factor to 8 bits, which is 0.16% off at p = 0.1.

Randomness: torch's default CPU generator yields one seed for a mask, and the mask's bits come from numpy's SFC64, whose
stream is guaranteed not to change between versions. So `torch.manual_seed` decides the mask, the number of threads does
not, and gradient checkpointing (which restores torch's generator) draws the same mask again.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

RESOLUTION = 2**15
SHARING = 64  # elements that share a bound; each bound costs a byte to draw
_STEPS_OF_A_BYTE = RESOLUTION // 256
_BITS_OF_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_stock_dropout = functional.dropout


@contextlib.contextmanager
def fast_dropout() -> Iterator[None]:
    """Within it `torch.nn.functional.dropout` on CPU tensors is `dropout`, in any model, without touching its code.

    Hold it around the forward and the backward pass: with gradient checkpointing the backward pass runs the forward
    pass again, and that must draw its masks in the same way. (A TorchFunctionMode would not do: it is switched off
    while `Tensor.backward` runs, because that is a torch function itself.)
    """
    before = functional.dropout
    functional.dropout = _divert
    try:
        yield
    finally:
        functional.dropout = before


def dropout(input: torch.Tensor, p: float) -> torch.Tensor:
    """Set elements to zero with probability `p` and divide the others by the probability of keeping them.

    Args:
        input: a floating-point CPU tensor of any shape.
        p: rounded to 1/32768; at 0 the input is returned, at 1 all is zero.

    Returns:
        A new tensor of the same shape and type.
    """
    threshold, scale = quantised_drop(p)
    if threshold == 0:
        return input
    return _Dropout.apply(input, threshold, scale)


def quantised_drop(p: float) -> tuple[int, float]:
    """How many of 32768 equally likely draws drop an element, and what the kept ones are multiplied by.

    A probability above 0 drops at least one draw and one below 1 keeps at least one.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a dropout probability lies between 0 and 1, not at {p}")
    if p in (0.0, 1.0):
        return int(p) * RESOLUTION, 1.0 - p
    threshold = min(max(round(p * RESOLUTION), 1), RESOLUTION - 1)
    return threshold, RESOLUTION / (RESOLUTION - threshold)


def draw_seed() -> int:
    """One draw of torch's default CPU generator, from which a mask can be drawn as often as it is needed."""
    return int(torch.randint(2**62, (), device="cpu"))


def mask_generator(seed: int) -> np.random.BitGenerator:
    """The source of one or more masks: the same seed gives the same masks in the same order."""
    return np.random.SFC64(seed)


def draw_kept(shape: Sequence[int], threshold: int, generator: np.random.BitGenerator) -> torch.Tensor:
    """Draw which elements are kept: a bool tensor of that shape, true with probability 1 - threshold / 32768."""
    elements = math.prod(shape)
    columns = -(-elements // SHARING)
    draws = generator.random_raw((columns * (SHARING + 1) + 7) // 8)
    drawn = torch.from_numpy(draws.view(np.int8))
    bytes_, shares = drawn[: columns * SHARING].view(SHARING, columns), drawn[columns * SHARING :][:columns]
    # a bound must fit into a byte too: where more than half are dropped, it is the kept ones that lie below it
    seldom = min(threshold, RESOLUTION - threshold)
    whole, rest = divmod(seldom, _STEPS_OF_A_BYTE)
    bounds = ((shares & (_STEPS_OF_A_BYTE - 1)) < rest).view(torch.int8) + (whole - 128)
    kept = bytes_ >= bounds if seldom == threshold else bytes_ < bounds
    return kept.view(-1)[:elements].view(tuple(shape))


def as_mask(kept: torch.Tensor) -> torch.Tensor:
    """The int16 mask of a bool tensor: -1 (all ones in binary) where an element is kept, 0 where it is dropped."""
    return torch.mul(kept.view(torch.int8), -1, out=torch.empty(kept.shape, dtype=torch.int16))


def keep_mask(shape: Sequence[int], threshold: int, generator: np.random.BitGenerator) -> torch.Tensor:
    """`as_mask` of `draw_kept`."""
    return as_mask(draw_kept(shape, threshold, generator))


def pack_kept(kept: torch.Tensor) -> torch.Tensor:
    """A bool tensor of any shape as one bit an element, uint8 [elements / 8]: a sixteenth of the mask, while it waits.

    Packing and unpacking take a third of the time of drawing it again.
    """
    return torch.from_numpy(np.packbits(kept.numpy())).clone()


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The int16 mask of the bool tensor of that shape that `pack_kept` was given."""
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=math.prod(shape)))
    return as_mask(bits.view(torch.bool).view(tuple(shape)))


def masked(input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`input` where `mask` keeps it and +0.0 elsewhere; a new contiguous tensor, not scaled."""
    bits = _BITS_OF_BYTES[input.element_size()]
    return (input.contiguous().view(bits) & mask.to(bits)).view(input.dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:  # type: ignore[override]
        ctx.scale = scale
        kept = draw_kept(input.shape, threshold, mask_generator(draw_seed()))
        ctx.packed = pack_kept(kept)
        return masked(input, as_mask(kept)).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        return masked(grad, unpack_mask(ctx.packed, grad.shape)).mul_(ctx.scale), None, None


def _divert(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    fast = training and not inplace and input.device.type == "cpu" and input.is_floating_point()
    if not fast or input.element_size() not in _BITS_OF_BYTES:
        return _stock_dropout(input, p, training, inplace)
    return dropout(input, p)
