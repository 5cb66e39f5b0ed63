"""Gradients summed without an order: the same bits on any number of processes.

Each microbatch's gradient is rounded once to a fixed-point grid and added as an integer; the ranks add up integers.
Integer sums do not depend on their order, floating-point sums do. The grid is the same for every tensor, so that it
depends on no shard. exact_shards.py has the engines that shard.

The norm that clips has the same bits too, however the gradient is split into tensors and over ranks: a summed gradient
is an fp32 multiple of 2^-50 below 2^12, so its square is a multiple of 2^-100 below 2^24 that float64 holds exactly.
Squares are cut into four digits, whose sums over a chunk float64 holds exactly too; Python's integers add up chunks.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from isotune.distributed.ranks import several_ranks
from isotune.io.errors import RunFault

SCALE_BITS = 50
# An int64 holds 2^63; with this margin the sum over all microbatches and ranks cannot wrap around unseen.
LARGEST = 2.0 ** (62 - SCALE_BITS)
# A digit has 32 bits, the last one 28. Adding and taking away 1.5 * 2^52 units rounds a square to a multiple of a unit.
UNITS = (2.0**-8, 2.0**-40, 2.0**-72)
SQUARE_BITS = 2 * SCALE_BITS
# Elements squared together, small tensors' in one chunk: as a CPU's cache takes, and few kernels on a GPU. Its bits and
# a digit's 32 stay within float64's 53.
CPU_CHUNK, GPU_CHUNK = 2**15, 2**20
WORD_BITS, WORDS = 32, 6  # how ranks add the sums of their shares, in int64


class ExactGradients:
    """Int64 accumulators in the place of `.grad`, fed by hooks after each microbatch's backward pass.

    Works under plain PyTorch, DDP, ZeRO 1 and 2, with no other gradient communication within an update. Memory: 8 bytes
    a trained parameter beyond the gradient itself. `model` is the prepared one, without its wrapper.
    """

    shards = False  # whether a rank holds only its share of each sum, reduced after each microbatch

    def __init__(self, model: nn.Module) -> None:
        self.names = {p: name for name, p in model.named_parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.sums = {p: torch.zeros(self.share_shape(p), dtype=torch.int64, device=p.device) for p in trained}
        self.largest = {p: torch.zeros((), dtype=torch.float64, device=p.device) for p in self.sums}
        self.seen: set[Any] = set()  # parameters with a gradient on this rank since the last update
        self.lacking: list[Any] = []  # those without one in the last sum, to which they added zeros
        self.loss_scale = 1.0  # fp16's, a power of two: divided out on the way in, multiplied on the way out
        self._hooks = [p.register_post_accumulate_grad_hook(self._absorb) for p in trained]

    def share_shape(self, parameter: Any) -> torch.Size:
        """Shape of what this rank holds of the sum of a parameter's gradients."""
        return parameter.shape

    @torch.no_grad()
    def _absorb(self, parameter: Any) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self.note_largest(parameter, gradient)
        self.sums[parameter] += self.integers(gradient)
        parameter.grad = None

    def note_largest(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Add the largest absolute value of a microbatch's whole gradient, any shape, to the bound of the sum.

        The parameter counts as `seen` from here on.
        """
        self.seen.add(parameter)
        if gradient.numel():
            lowest, highest = gradient.aminmax()  # a NaN makes both NaN
            bound = self.largest[parameter]
            bound += torch.maximum(-lowest, highest).to(bound.device, torch.float64) / self.loss_scale

    def integers(self, gradient: torch.Tensor) -> torch.Tensor:
        """A microbatch's gradient, any shape, rounded to the grid: int64 in units of 2^-SCALE_BITS."""
        # powers of two: the product is exact
        return gradient.double().mul_(2.0**SCALE_BITS / self.loss_scale).round_().to(torch.int64)

    def end_microbatch(self) -> None:
        """After a microbatch's backward pass, on every rank."""

    def reduce(self) -> None:
        """Sum over the ranks into the gradient; RunFault where one left the range of the grid, on any rank."""
        self.check(self.add_ranks().tolist())

    @torch.no_grad()
    def add_ranks(self) -> torch.Tensor:
        """Sum over the ranks into the gradient without waiting for the device; the bounds for `check`, float64."""
        bounds = torch.stack(list(self.largest.values()))
        if several_ranks():
            dist.all_reduce(bounds)
        for parameter, total in self.sums.items():
            if several_ranks() and not self.shards:
                dist.all_reduce(total)
            self.assign(parameter, total.double() * (self.loss_scale / 2.0**SCALE_BITS))
        self.lacking = [parameter for parameter in self.sums if parameter not in self.seen]
        self.clear()
        return bounds

    @torch.no_grad()
    def check(self, bounds: list[float]) -> None:
        """RunFault where a sum left the range of the grid; NaN in the place of a gradient that was no number."""
        for parameter, bound in zip(self.sums, bounds, strict=True):
            if math.isfinite(bound) and bound >= LARGEST:
                raise RunFault(
                    f"the gradient of {self.names[parameter]} reached {bound:.3g}, beyond the {LARGEST:.0f} that "
                    "exact_gradients can add up: lower the learning rate, or say exact_gradients: false"
                )
            if not math.isfinite(bound):  # there is no such integer: the check of the gradient norm shall see it
                self.assign(parameter, torch.full_like(self.sums[parameter], math.nan, dtype=torch.float64))

    def assign(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Put this rank's summed gradient, float64 of `share_shape`, where the optimizer looks for it."""
        parameter.grad = gradient.to(parameter.dtype)

    def gradients(self) -> list[torch.Tensor]:
        """This rank's summed gradients after `reduce`, to be changed in place."""
        return [parameter.grad for parameter in self.sums if parameter.grad is not None]

    def clip(self, max_norm: float) -> float:
        """Clip the summed gradient to `max_norm` (0: not at all); returns its norm before, the same on every rank."""
        return clip_exactly(self.gradients(), max_norm or math.inf, add_ranks=self.shards)

    def is_finite(self) -> bool:
        """Whether every gradient added on this rank since the last update was a number."""
        return all(math.isfinite(bound.item()) for bound in self.largest.values())

    def clear(self) -> None:
        """Forget what was added since the last update."""
        for sums in (*self.sums.values(), *self.largest.values()):
            sums.zero_()
        self.seen.clear()

    def remove(self) -> None:
        """Give the parameters back to ordinary accumulation."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def clip_exactly(gradients: list[torch.Tensor], max_norm: float, *, add_ranks: bool) -> float:
    """Scale `gradients` in place so that their norm is at most `max_norm`, as torch does; returns the norm before.

    `add_ranks`: each rank gives its own share, and the norm is that of all shares; collective. NaN, and nothing is
    scaled, where an element of any rank is NaN or Inf.
    """
    norm = exact_norm(digit_sums(gradients).tolist(), gradients[0].device, add_ranks=add_ranks)
    scale_to(gradients, norm, max_norm)
    return norm


@torch.no_grad()
def scale_to(gradients: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale `gradients` of this norm in place, so that it is at most `max_norm`."""
    factor = max_norm / (norm + 1e-6)
    if factor < 1.0:
        for gradient in gradients:
            gradient.mul_(factor)


@torch.no_grad()
def digit_sums(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The sums of which `exact_norm` is made, flat float64, without waiting for the device."""
    device = gradients[0].device
    sums = [_digit_sums(chunk) for chunk in _chunks(gradients, CPU_CHUNK if device.type == "cpu" else GPU_CHUNK)]
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device=device)


def exact_norm(digits: list[float], device: torch.device, *, add_ranks: bool) -> float:
    """The norm, from an exact sum of squares; see `clip_exactly`."""
    broken = not all(map(math.isfinite, digits))
    total = 0 if broken else sum(int(math.ldexp(digit, SQUARE_BITS)) for digit in digits)
    if add_ranks and several_ranks():
        words = [total >> WORD_BITS * place & 2**WORD_BITS - 1 for place in range(WORDS)]
        added = torch.tensor([*words, broken], dtype=torch.int64, device=device)
        dist.all_reduce(added)
        *words, broken = added.tolist()
        total = sum(word << WORD_BITS * place for place, word in enumerate(words))
    return math.nan if broken else math.sqrt(total / 2**SQUARE_BITS)  # Python divides integers with one rounding


def _digit_sums(chunk: torch.Tensor) -> torch.Tensor:
    """The sums of the digits of all squares of a flat chunk: float64 [4], each exact; NaN where an element is none."""
    rest = chunk.double().square_()
    sums = []
    for unit in UNITS:
        digit = torch.add(rest, 1.5 * 2.0**52 * unit).sub_(1.5 * 2.0**52 * unit)
        sums.append(digit.sum())
        rest.sub_(digit)
    return torch.stack([*sums, rest.sum()])


def _chunks(tensors: list[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """All elements, in flat tensors of at most `size`."""
    waiting: list[torch.Tensor] = []
    free = size
    for tensor in tensors:
        flat = tensor.reshape(-1)
        while len(flat):
            part, flat = flat[:free], flat[free:]
            waiting.append(part)
            free -= len(part)
            if not free:
                yield torch.cat(waiting) if len(waiting) > 1 else part
                waiting, free = [], size
    if waiting:
        yield torch.cat(waiting)
