"""Gradients summed without an order: the same bits on any number of processes.

Each microbatch's gradient is rounded once to a fixed-point grid and added as an integer; the ranks all-reduce
integers. Integer sums do not depend on their order, floating-point sums do.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from isotune.distributed.ranks import several_ranks
from isotune.io.errors import RunFault

SCALE_BITS = 50
# An int64 holds 2^63; with this margin the sum over all microbatches and ranks cannot wrap around unseen.
LARGEST = 2.0 ** (62 - SCALE_BITS)


class ExactGradients:
    """Int64 accumulators in the place of `.grad`, fed by hooks after each microbatch's backward pass.

    Works under plain and DDP training, with every backward pass under `no_sync`: no other gradient communication
    happens. Memory: 8 bytes a trained parameter beyond the gradient itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {p: name for name, p in model.named_parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.sums = {p: torch.zeros(p.shape, dtype=torch.int64, device=p.device) for p in trained}
        self.largest = {p: torch.zeros((), dtype=torch.float64, device=p.device) for p in self.sums}
        self.loss_scale = 1.0  # fp16's, a power of two: divided out on the way in, multiplied on the way out
        self._hooks = [p.register_post_accumulate_grad_hook(self._absorb) for p in trained]

    @torch.no_grad()
    def _absorb(self, parameter: Any) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.numel():
            lowest, highest = gradient.aminmax()  # a NaN makes both NaN
            self.largest[parameter] += torch.maximum(-lowest, highest).double() / self.loss_scale
        # powers of two: the product is exact
        fixed = gradient.double().mul_(2.0**SCALE_BITS / self.loss_scale).round_()
        self.sums[parameter] += fixed.to(torch.int64)
        parameter.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum over the ranks into `.grad`; RunFault where a gradient left the range of the grid, on any rank."""
        bounds = torch.stack(list(self.largest.values()))
        if several_ranks():
            dist.all_reduce(bounds)
        for (parameter, total), bound in zip(self.sums.items(), bounds.tolist(), strict=True):
            if math.isfinite(bound) and bound >= LARGEST:
                raise RunFault(
                    f"the gradient of {self.names[parameter]} reached {bound:.3g}, beyond the {LARGEST:.0f} that "
                    "exact_gradients can add up: lower the learning rate, or say exact_gradients: false"
                )
            if several_ranks():
                dist.all_reduce(total)
            if math.isfinite(bound):
                gradient = total.double() * (self.loss_scale / 2.0**SCALE_BITS)
            else:  # there is no such integer: the check of the gradient norm shall see it
                gradient = torch.full_like(total, math.nan, dtype=torch.float64)
            parameter.grad = gradient.to(parameter.dtype)
        self.clear()

    def is_finite(self) -> bool:
        """Whether every gradient added on this rank since the last update was a number."""
        return all(math.isfinite(bound.item()) for bound in self.largest.values())

    def clear(self) -> None:
        """Forget what was added since the last update."""
        for sums in (*self.sums.values(), *self.largest.values()):
            sums.zero_()

    def remove(self) -> None:
        """Give the parameters back to ordinary accumulation."""
        for hook in self._hooks:
            hook.remove()
