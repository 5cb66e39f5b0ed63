"""Where DeepSpeed's ZeRO optimizers keep the training state: fragments of flat groups, or partitions of parameters.

Written against DeepSpeed 0.19, whose own checkpoints are pickles that only as many ranks can read.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isotune.checkpoint.engine_state import (
    MODEL,
    OPTIMIZER,
    EngineState,
    OptimizerNumbers,
    TorchState,
    as_number,
    dtype_name,
    dtype_of,
    is_scalar,
    scalar_for,
    trained_parameters,
)
from isotune.checkpoint.flat_tensors import FlatTensor
from isotune.io.errors import UserError


class _FlatGroups(ABC):
    """What both kinds share: torch's optimizer steps over long flat tensors, each of many parameters' slices."""

    def __init__(self, model: nn.Module, zero: Any) -> None:
        self.zero = zero
        self.names = trained_parameters(model)
        self._group_of = {id(p): number for number, group in enumerate(self._members()) for p in group}

    @abstractmethod
    def _members(self) -> list[list[nn.Parameter]]:
        """The parameters of each flat tensor."""

    @abstractmethod
    def _flats(self) -> list[Tensor]:
        """This rank's share of each."""

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.zero.optimizer.state.get(self._flats()[self._group_of[id(parameter)]], {})

    def _slots(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {key: value for key, value in sorted(self._state_of(parameter).items()) if not is_scalar(value)}

    def numbers(self) -> OptimizerNumbers:
        """See `EngineState`."""
        found = OptimizerNumbers()
        for name, parameter in self.names.items():
            flat = self._flats()[self._group_of[id(parameter)]]
            for key, value in self._state_of(parameter).items():
                if is_scalar(value):
                    found.scalars.setdefault(name, {})[key] = as_number(value)
                elif value.shape == flat.shape:
                    found.slots.setdefault(name, {})[key] = dtype_name(value.dtype)
                else:
                    kind = type(self.zero.optimizer).__name__
                    raise UserError(f"optim: {kind} keeps tensors that ZeRO cannot save: use adamw_torch")
        return found

    def make_optimizer_state(self, numbers: OptimizerNumbers) -> None:
        """See `EngineState`."""
        groups = {id(p): group for group in self.zero.optimizer.param_groups for p in group["params"]}
        for name, parameter in self.names.items():
            flat = self._flats()[self._group_of[id(parameter)]]
            if flat in self.zero.optimizer.state or name not in numbers.slots.keys() | numbers.scalars.keys():
                continue
            state: dict[str, Any] = {
                key: torch.zeros_like(flat, dtype=dtype_of(dtype), requires_grad=False)
                for key, dtype in numbers.slots.get(name, {}).items()
            }
            for key, value in numbers.scalars.get(name, {}).items():
                group = groups.get(id(flat), self.zero.optimizer.param_groups[0])
                state[key] = scalar_for(self.zero.optimizer, group, flat, value)
            self.zero.optimizer.state[flat] = state


class FragmentState(_FlatGroups):
    """ZeRO-1 and 2: a rank owns a stretch of each flat group, and so a fragment of some parameters."""

    def _members(self) -> list[list[nn.Parameter]]:
        return self.zero.bit16_groups

    def _flats(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def model(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {MODEL + name: self._fragment(p, None) for name, p in self.names.items()}

    def optimizer(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {
            f"{OPTIMIZER}{name}/{key}": self._fragment(p, value)
            for name, p in self.names.items()
            for key, value in self._slots(p).items()
        }

    def _fragment(self, parameter: Any, state: Tensor | None) -> FlatTensor:
        """This rank's part of a parameter's master copy, or of what `state` holds for its group."""
        flat = self._flats()[self._group_of[id(parameter)]] if state is None else state
        mapping = parameter._hp_mapping
        if mapping is None:
            return FlatTensor(flat.new_empty(0), 0, parameter.numel())
        place, within = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return FlatTensor(flat.detach().narrow(0, place.start, place.numel), within.start, parameter.numel())

    def after_reading(self) -> None:
        """Round the master copies to the model's weights, and gather these."""
        self.zero.update_lp_params()
        self.zero._hp_optimizer_states_linked = False


class PartitionState(_FlatGroups):
    """ZeRO-3: a rank owns the same share of every parameter, the last ones padded."""

    def __init__(self, model: nn.Module, zero: Any) -> None:
        super().__init__(model, zero)
        if any(zero._swappable_optimizer_subgroup(number) for number in range(len(zero.fp16_groups))):
            raise UserError("offload to NVMe cannot be checkpointed: offload to cpu instead")

    def _members(self) -> list[list[nn.Parameter]]:
        return self.zero.fp16_groups

    def _flats(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def model(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {MODEL + name: self._partition(p, None) for name, p in self.names.items()}

    def optimizer(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {
            f"{OPTIMIZER}{name}/{key}": self._partition(p, value)
            for name, p in self.names.items()
            for key, value in self._slots(p).items()
        }

    def _partition(self, parameter: Any, state: Tensor | None) -> FlatTensor:
        number, place, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat = self._flats()[number] if state is None else state
        rank = dist.get_rank(group=self.zero._get_param_partition_group(parameter))
        start = min(rank * padded, parameter.ds_numel)
        length = min(padded, parameter.ds_numel - start)
        return FlatTensor(flat.detach().narrow(0, place, length), start, parameter.ds_numel)

    def after_reading(self) -> None:
        """Round the master copies to the model's partitions, and gather those that every rank keeps whole."""
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def state_of(model: nn.Module, optimizer: Any) -> EngineState:
    """The state of a prepared model, out of its wrapper, and of the optimizer that an engine made of ours.

    Raises:
        UserError: DeepSpeed made something of it that this version does not know.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return PartitionState(model, optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return FragmentState(model, optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchState(model, optimizer)
    raise UserError(f"{type(optimizer).__name__} cannot be checkpointed: use ZeRO stage 1, 2 or 3, or DDP")
