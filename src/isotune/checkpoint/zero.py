"""Training state of DeepSpeed's ZeRO optimizers, which step over long flat tensors of many parameters' slices."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from isotune.checkpoint.engine_state import (
    MODEL,
    OPTIMIZER,
    EngineState,
    OptimizerState,
    TorchState,
    as_number,
    dtype_name,
    dtype_of,
    is_scalar,
    scalar_for,
    trained_parameters,
)
from isotune.checkpoint.flat_tensors import FlatTensor
from isotune.compat import deepspeed as compat
from isotune.io.errors import UserError


class ZeroState(ABC):
    """What all stages share. See `EngineState` for the methods.

    Args:
        model: out of its engine's wrapper.
        zero: DeepSpeed's optimizer, which wraps one of torch's.
    """

    def __init__(self, model: nn.Module, zero: Any) -> None:
        self.zero = zero
        self.parameters = trained_parameters(model)
        self._group_of = {id(p): index for index, group in enumerate(self._groups()) for p in group}

    @abstractmethod
    def _groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each flat tensor."""

    @abstractmethod
    def _flat_tensors(self) -> list[Tensor]:
        """This rank's part of each flat tensor, in fp32."""

    @abstractmethod
    def _slice_of(self, parameter: nn.Parameter) -> compat.Slice:
        """This rank's part of a parameter."""

    @abstractmethod
    def _size_of(self, parameter: Any) -> int:
        """Elements of the whole parameter."""

    @abstractmethod
    def after_reading(self) -> None:
        """See `EngineState`."""

    def model(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {MODEL + name: self._part(p, self._flat_of(p)) for name, p in self.parameters.items()}

    def optimizer(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {
            f"{OPTIMIZER}{name}/{key}": self._part(p, value)
            for name, p in self.parameters.items()
            for key, value in sorted(self._state_of(p).items())
            if not is_scalar(value)
        }

    def optimizer_state(self) -> OptimizerState:
        """See `EngineState`."""
        state = OptimizerState()
        for name, parameter in self.parameters.items():
            for key, value in self._state_of(parameter).items():
                if is_scalar(value):
                    state.scalars.setdefault(name, {})[key] = as_number(value)
                elif value.shape == self._flat_of(parameter).shape:
                    state.slots.setdefault(name, {})[key] = dtype_name(value.dtype)
                else:
                    kind = type(self.zero.optimizer).__name__
                    raise UserError(f"optim: {kind} keeps tensors that ZeRO cannot save: use adamw_torch")
        return state

    def make_optimizer_state(self, saved: OptimizerState) -> None:
        """See `EngineState`."""
        optimizer = self.zero.optimizer
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self.parameters.items():
            flat = self._flat_of(parameter)
            if flat in optimizer.state or name not in saved.slots.keys() | saved.scalars.keys():
                continue
            state: dict[str, Any] = {
                key: torch.zeros_like(flat, dtype=dtype_of(dtype), requires_grad=False)
                for key, dtype in saved.slots.get(name, {}).items()
            }
            for key, value in saved.scalars.get(name, {}).items():
                group = groups.get(id(flat), optimizer.param_groups[0])
                state[key] = scalar_for(optimizer, group, flat, value)
            optimizer.state[flat] = state

    def _flat_of(self, parameter: nn.Parameter) -> Tensor:
        return self._flat_tensors()[self._group_of[id(parameter)]]

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.zero.optimizer.state.get(self._flat_of(parameter), {})

    def _part(self, parameter: nn.Parameter, flat: Tensor) -> FlatTensor:
        """This rank's part of a parameter, or of an optimizer state, in a tensor as long as the parameter's group."""
        own = self._slice_of(parameter)
        return FlatTensor(flat.detach().narrow(0, own.flat_start, own.length), own.start, self._size_of(parameter))


class Zero12State(ZeroState):
    """ZeRO-1 and 2: a rank owns a stretch of each flat tensor, and so a fragment of some parameters."""

    def _groups(self) -> list[list[nn.Parameter]]:
        return self.zero.bit16_groups

    def _flat_tensors(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def _slice_of(self, parameter: nn.Parameter) -> compat.Slice:
        return compat.zero12_slice(parameter)

    def _size_of(self, parameter: Any) -> int:
        return parameter.numel()

    def after_reading(self) -> None:
        """See `EngineState`."""
        compat.zero12_after_load(self.zero)


class Zero3State(ZeroState):
    """ZeRO-3: a rank owns a part of every parameter.

    Raises:
        UserError: the optimizer is on NVMe.
    """

    def __init__(self, model: nn.Module, zero: Any) -> None:
        super().__init__(model, zero)
        if compat.offloads_to_nvme(zero):
            raise UserError("offload to NVMe cannot be checkpointed: offload to cpu instead")

    def _groups(self) -> list[list[nn.Parameter]]:
        return self.zero.fp16_groups

    def _flat_tensors(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def _slice_of(self, parameter: nn.Parameter) -> compat.Slice:
        return compat.zero3_slice(self.zero, parameter)

    def _size_of(self, parameter: Any) -> int:
        return parameter.ds_numel

    def after_reading(self) -> None:
        """See `EngineState`."""
        compat.zero3_after_load(self.zero)


def state_of(model: nn.Module, optimizer: Any) -> EngineState:
    """The training state of a prepared model and optimizer.

    Args:
        model: out of its engine's wrapper.
        optimizer: torch's, or DeepSpeed's around it.

    Raises:
        UserError: an optimizer of DeepSpeed that this version does not know.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return Zero3State(model, optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return Zero12State(model, optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchState(model, optimizer)
    raise UserError(f"{type(optimizer).__name__} cannot be checkpointed: use ZeRO stage 1, 2 or 3, or DDP")
