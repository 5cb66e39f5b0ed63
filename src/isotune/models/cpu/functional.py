"""Faster dropout and linear of torch.nn.functional on CPU, for any model: `fast_dropout` and `onednn_products`.

Dropout takes a fifth of the time of torch's, whose `bernoulli` draws one slow number per element. One 64-bit draw
serves eight elements: each compares a random byte with a bound, and the result becomes a mask of all ones or all zeros,
which is AND-ed with the bits of the input. The probability is rounded to 1/32768 (0.1 becomes 0.100006). A byte
resolves 1/256 only; the rest comes from the bound, which is one higher for a random share of the elements. 64 elements,
spread evenly over the tensor, share one bound, which correlates two of them by less than 0.0002 for probabilities from
0.02 to 0.98. Kept elements are divided by the rounded keep probability, so the expectation is exact; torch's bf16 mask
rounds that factor to 8 bits, an error of 0.16% at p = 0.1.

Randomness: torch's default CPU generator yields one seed per mask, and the bits of the mask come from numpy's SFC64,
whose stream is guaranteed not to change between versions. So the mask depends on `torch.manual_seed` and not on the
number of threads, and gradient checkpointing (which restores torch's generator) draws the same mask again.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from isotune.compat.torch import AutogradFunction, has_onednn_bf16_linear, has_onednn_linear, onednn_linear

RESOLUTION = 2**15
SHARING = 64  # elements that share a bound; each bound costs one random byte
_STEPS_PER_BYTE = RESOLUTION // 256
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_stock_dropout, _stock_linear = functional.dropout, functional.linear


@contextlib.contextmanager
def _replaced(name: str, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within it `torch.nn.functional.NAME` is `function`, for every model, whose code looks it up at each call.

    A patch, because a TorchFunctionMode is off while `Tensor.backward` runs (that is a torch function itself), and
    gradient checkpointing repeats the forward pass there.
    """
    before = getattr(functional, name)
    setattr(functional, name, function)
    try:
        yield
    finally:
        setattr(functional, name, before)


def fast_dropout() -> contextlib.AbstractContextManager[None]:
    """Within it `torch.nn.functional.dropout` on CPU tensors is `dropout`.

    Hold it around the forward and the backward pass: gradient checkpointing repeats the forward pass in the backward
    pass, and must draw the same masks.
    """
    return _replaced("dropout", _functional_dropout)


def onednn_products() -> contextlib.AbstractContextManager[None]:
    """Within it, with gradients off, `torch.nn.functional.linear` of fp32 on CPU is oneDNN's, where torch has oneDNN.

    On an AMD EPYC with AVX-512, torch's `linear` (MKL 2024.2) reaches 100 GFLOP/s on one core and oneDNN 220; on other
    processors the two are alike. They sum in different orders, so results differ by rounding. Training keeps torch's,
    because its losses are promised bit for bit.
    """
    return _replaced("linear", _functional_linear) if has_onednn_linear() else contextlib.nullcontext()


def dropout(input: torch.Tensor, p: float) -> torch.Tensor:
    """Set elements of a floating-point CPU tensor to zero with probability `p` and divide the others by 1 - `p`.

    `p` is rounded to 1/32768; at 0 the input itself is returned, at 1 all elements are zero.
    """
    threshold, scale = quantised_drop(p)
    if threshold == 0:
        return input
    return _Dropout.apply(input, threshold, scale)


def quantised_drop(p: float) -> tuple[int, float]:
    """How many of 32768 equally likely draws drop an element, and the factor of the kept elements.

    A probability above 0 drops at least one draw, and one below 1 keeps at least one.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a dropout probability lies between 0 and 1, not at {p}")
    if p in (0.0, 1.0):
        return int(p) * RESOLUTION, 1.0 - p
    threshold = min(max(round(p * RESOLUTION), 1), RESOLUTION - 1)
    return threshold, RESOLUTION / (RESOLUTION - threshold)


def draw_seed() -> int:
    """A seed from torch's default CPU generator; the same seed draws the same mask again."""
    return int(torch.randint(2**62, (), device="cpu"))


def mask_generator(seed: int) -> np.random.BitGenerator:
    """A generator of masks: the same seed yields the same masks in the same order."""
    return np.random.SFC64(seed)


def draw_kept(shape: Sequence[int], threshold: int, generator: np.random.BitGenerator) -> torch.Tensor:
    """Draw a bool tensor of which elements are kept, true with probability 1 - threshold / 32768."""
    elements = math.prod(shape)
    columns = -(-elements // SHARING)
    draws = generator.random_raw((columns * (SHARING + 1) + 7) // 8)
    drawn = torch.from_numpy(draws.view(np.int8))
    bytes_, shares = drawn[: columns * SHARING].view(SHARING, columns), drawn[columns * SHARING :][:columns]
    # a bound must fit into a byte: where more than half are dropped, the kept elements are those below it
    rarer = min(threshold, RESOLUTION - threshold)
    whole, rest = divmod(rarer, _STEPS_PER_BYTE)
    bounds = ((shares & (_STEPS_PER_BYTE - 1)) < rest).view(torch.int8) + (whole - 128)
    kept = bytes_ >= bounds if rarer == threshold else bytes_ < bounds
    return kept.view(-1)[:elements].view(tuple(shape))


def as_mask(kept: torch.Tensor) -> torch.Tensor:
    """The int16 mask of a bool tensor: -1 (all ones in binary) where an element is kept, 0 where it is dropped."""
    return torch.mul(kept.view(torch.int8), -1, out=torch.empty(kept.shape, dtype=torch.int16))


def pack_kept(kept: torch.Tensor) -> torch.Tensor:
    """A bool tensor of any shape with one bit per element, uint8 [elements / 8]: a sixteenth of the mask, to save it.

    Packing and unpacking take a third of the time of drawing it again.
    """
    return torch.from_numpy(np.packbits(kept.numpy())).clone()


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The int16 mask of a bool tensor that `pack_kept` packed."""
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=math.prod(shape)))
    return as_mask(bits.view(torch.bool).view(tuple(shape)))


def draw_mask(shape: Sequence[int], threshold: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A new int16 mask, and the same packed to save it for the backward pass; None where nothing is dropped."""
    if threshold == 0:
        return None, None
    kept = draw_kept(shape, threshold, mask_generator(draw_seed()))
    return as_mask(kept), pack_kept(kept)


def masked(input: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`input` where `mask` keeps it and +0.0 elsewhere, a new contiguous tensor, not scaled; without a mask itself."""
    if mask is None:
        return input
    bits = _INTEGER_OF_SIZE[input.element_size()]
    return (input.contiguous().view(bits) & mask.to(bits)).view(input.dtype)


class Workspace:
    """Memory on CPU for one tensor at a time, used again: new blocks of many megabytes are fresh pages every time."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; it overwrites the previous one."""
        elements = math.prod(shape)
        if self.buffer.dtype != dtype or self.buffer.numel() < elements:
            self.buffer = torch.empty(elements, dtype=dtype)
        return self.buffer[:elements].view(*shape)


class _Dropout(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
        ctx.scale = scale
        mask, ctx.packed = draw_mask(input.shape, threshold)
        return masked(input, mask).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return masked(grad, unpack_mask(ctx.packed, grad.shape)).mul_(ctx.scale), None, None


def _functional_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    applies = training and not inplace and input.device.type == "cpu" and input.is_floating_point()
    if not applies or input.element_size() not in _INTEGER_OF_SIZE:
        return _stock_dropout(input, p, training, inplace)
    return dropout(input, p)


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
