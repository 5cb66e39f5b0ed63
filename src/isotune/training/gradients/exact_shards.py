"""Exact gradients where the engine shards them: FSDP2 and ZeRO-3.

After each microbatch the whole gradients are rounded to the grid and reduce-scattered as int64, so a rank keeps the
integers of its own share: 8 bytes a trained parameter, divided by the number of ranks. What is whole at any time is a
bucket: FSDP2's group of parameters (a block, the rest), ZeRO-3's BUCKET. NCCL and gloo both reduce-scatter int64.

A share is as large as on the last rank of all, so shares are padded with zeros. A bucket lies in memory as
[ranks, padded shares of its parameters].
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional

from isotune.compat.deepspeed import set_zero3_gradient, zero3_padded_share
from isotune.compat.torch import DefaultReduceScatter, ReduceScatter, reduce_scatter
from isotune.io.errors import UserError
from isotune.training.gradients.exact_gradients import ExactGradients

BUCKET = 2**23  # elements of ZeRO-3's gradients that wait for each other; a larger one travels alone


class Fsdp2ExactGradients(ExactGradients):
    """FSDP2 hands each group's gradients to `_IntegerReduceScatter`, then calls the hook of each parameter in order.

    The engine's own sum over microbatches, in fp32, stays empty: the hooks take each shard away.
    """

    shards = True

    def __init__(self, model: nn.Module) -> None:
        """UserError where the engine is not FSDP2, or adds over a part of the ranks: HSDP and others."""
        if not all(_spans_all_ranks(p) for p in model.parameters() if p.requires_grad):
            raise UserError(
                "exact_gradients: true takes FSDP2 with one share a process: say fsdp_version: 2, without "
                "parallelism_config"
            )
        super().__init__(model)
        self._group = _IntegerReduceScatter(self)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_custom_reduce_scatter(self._group)

    def remove(self) -> None:
        """The engine sums its gradients itself again."""
        super().remove()
        for module in self._modules:
            module.set_custom_reduce_scatter(DefaultReduceScatter())

    def share_shape(self, parameter: Any) -> torch.Size:
        """That of the local shard."""
        return parameter.to_local().shape

    @torch.no_grad()
    def _absorb(self, parameter: Any) -> None:
        local = parameter.grad.to_local()
        parameter.grad = None
        if parameter.device_mesh.size() == 1:  # FSDP2 copies there, and calls no reduce-scatter
            self.note_largest(parameter, local)
            self.sums[parameter] += self.integers(local)
            return
        rows = math.ceil(parameter.shape[0] / parameter.device_mesh.size())
        values, integers = self._group.take(rows * math.prod(parameter.shape[1:]))
        self.note_largest(parameter, values)
        self.sums[parameter] += integers[: local.numel()].view(local.shape).to(parameter.device)

    def assign(self, parameter: Any, gradient: torch.Tensor) -> None:
        """A DTensor, sharded as the parameter is."""
        whole: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}  # shares may be uneven
        local = gradient.to(parameter.dtype)
        parameter.grad = DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, run_check=False, **whole
        )

    def gradients(self) -> list[torch.Tensor]:
        """The local shards."""
        return [gradient.to_local() for gradient in super().gradients()]  # type: ignore[attr-defined]  (DTensors)


def _spans_all_ranks(parameter: Any) -> bool:
    mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
    return mesh is not None and (mesh.ndim, mesh.size()) == (1, dist.get_world_size())


class _IntegerReduceScatter(ReduceScatter):
    """FSDP2's reduce-scatter, in integers; the hooks of the group's parameters then take their parts one by one."""

    def __init__(self, exact: ExactGradients) -> None:
        self._exact, self._taken = exact, 0
        self._values = self._integers = torch.empty(0)

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for FSDP2's bucket."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, *_: Any, **__: Any) -> None:
        """`input_tensor` [ranks * padded shares] in any floating type; `output_tensor` is set to zero."""
        self._values = input_tensor.view(dist.get_world_size(group), -1)
        self._integers = reduce_scatter(self._exact.integers(input_tensor), group)
        self._taken = 0
        output_tensor.zero_()

    def take(self, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next parameter's: this rank's whole gradient [ranks, numel], and its summed share, int64 [numel]."""
        part = slice(self._taken, self._taken + numel)
        self._taken = part.stop
        found = self._values[:, part], self._integers[part]
        if self._taken == len(self._integers):  # FSDP2 may free its bucket
            self._values = self._integers = torch.empty(0)
        return found


class Zero3ExactGradients(ExactGradients):
    """ZeRO-3 coalesces its own reduction, and finds no gradient at its end: `hand_over` puts the shares there."""

    shards = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._bucket: list[tuple[Any, torch.Tensor]] = []
        self._shares: dict[Any, torch.Tensor] = {}

    def share_shape(self, parameter: Any) -> torch.Size:
        """Flat, padded to the same length on every rank."""
        return torch.Size([zero3_padded_share(parameter)])

    @torch.no_grad()
    def _absorb(self, parameter: Any) -> None:
        gradient, parameter.grad = parameter.grad, None
        self.note_largest(parameter, gradient)
        self._bucket.append((parameter, gradient))
        if sum(gradient.numel() for _, gradient in self._bucket) >= BUCKET:
            self.end_microbatch()

    @torch.no_grad()
    def end_microbatch(self) -> None:
        """Reduce-scatter what waits in the bucket; backward passes fill it in the same order on every rank."""
        if not self._bucket:
            return
        ranks = dist.get_world_size()
        lengths = [self.sums[parameter].numel() for parameter, _ in self._bucket]
        rows = [
            functional.pad(gradient.reshape(-1), (0, ranks * length - gradient.numel())).view(ranks, length)
            for (_, gradient), length in zip(self._bucket, lengths, strict=True)
        ]
        summed = reduce_scatter(self.integers(torch.cat(rows, dim=1)).view(-1), dist.group.WORLD)
        for (parameter, _), integers in zip(self._bucket, summed.split(lengths), strict=True):
            self.sums[parameter] += integers
        self._bucket = []

    def assign(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Kept in fp32 until `hand_over`: a parameter cannot hold the gradient of a share."""
        self._shares[parameter] = gradient.float()

    def gradients(self) -> list[torch.Tensor]:
        """The shares in fp32, also of 16-bit parameters."""
        return list(self._shares.values())

    def hand_over(self) -> None:
        """Give each share to the engine, before its step; the shares are forgotten here."""
        for parameter, share in self._shares.items():
            set_zero3_gradient(parameter, share)
        self._shares = {}

    def clear(self) -> None:
        """Forget what was added since the last update."""
        super().clear()
        self._bucket = []
