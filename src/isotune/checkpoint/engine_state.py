"""The training state of an engine as flat tensors and JSON, in the same form for every engine.

    model/NAME            a trained parameter, in fp32 where the engine trains an fp32 copy of it
    optimizer/NAME/KEY    an optimizer state as long as its parameter, e.g. exp_avg
    OptimizerState        JSON: the other optimizer states, e.g. step

Frozen parameters are not part of it: they are loaded again by the recipe.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from isotune.checkpoint.flat_tensors import FlatTensor, share_of
from isotune.compat.torch import global_offset
from isotune.io.errors import UserError

MODEL, OPTIMIZER = "model/", "optimizer/"


@dataclass
class OptimizerState:
    """State of an optimizer by parameter name and key, without the contents of its tensors.

    Attributes:
        slots: dtypes of tensors as long as their parameter.
        others: [shape, dtype] of other tensors, such as factors and quantisation tables.
        scalars: values of scalars.
    """

    slots: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    others: dict[str, dict[str, list[Any]]] = field(default_factory=dict[str, dict[str, list[Any]]])
    scalars: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class EngineState(Protocol):
    """Access to the state of an engine."""

    def model(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """The trained parameters, sharing their memory: what this rank writes, or with `to_read` all that it needs."""
        ...

    def optimizer(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """The same for the optimizer's tensors."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """The rest of the optimizer's state."""
        ...

    def make_optimizer_state(self, saved: OptimizerState) -> None:
        """Create the state of an optimizer that has not stepped yet; `read_tensors` then fills its tensors."""
        ...

    def after_reading(self) -> None:
        """Update what the engine computes from the tensors that were just read."""
        ...


class TorchState:
    """Plain training, DDP, FSDP2 and DeepSpeed without ZeRO: a torch optimizer over the parameters themselves."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = trained_parameters(model)
        self._optimizer = optimizer
        self._sharded = any(isinstance(p, DTensor) for p in self.parameters.values())

    def model(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {MODEL + name: _flat(parameter, to_read) for name, parameter in self.parameters.items()}

    def optimizer(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {
            f"{OPTIMIZER}{name}/{key}": _flat(value, to_read)
            for name, parameter in self.parameters.items()
            for key, value in sorted(self._optimizer.state.get(parameter, {}).items(), key=lambda item: item[0])
            if not is_scalar(value)
        }

    def optimizer_state(self) -> OptimizerState:
        """See `EngineState`."""
        state = OptimizerState()
        for name, parameter in self.parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if is_scalar(value):
                    state.scalars.setdefault(name, {})[key] = as_number(value)
                elif value.numel() == parameter.numel():
                    state.slots.setdefault(name, {})[key] = dtype_name(value.dtype)
                elif self._sharded:
                    raise UserError(
                        f"optim: {type(self._optimizer).__name__} keeps tensors that a sharded engine cannot save: "
                        "use adamw_torch"
                    )
                else:
                    state.others.setdefault(name, {})[key] = [list(value.shape), dtype_name(value.dtype)]
        return state

    @torch.no_grad()
    def make_optimizer_state(self, saved: OptimizerState) -> None:
        """See `EngineState`."""
        groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        for name, parameter in self.parameters.items():
            state: dict[str, Any] = {}
            for key, dtype in saved.slots.get(name, {}).items():
                state[key] = torch.zeros_like(parameter, dtype=dtype_of(dtype), requires_grad=False)
            for key, (shape, dtype) in saved.others.get(name, {}).items():
                state[key] = torch.zeros(shape, dtype=dtype_of(dtype), device=parameter.device)
            for key, value in saved.scalars.get(name, {}).items():
                state[key] = scalar_for(self._optimizer, groups[parameter], parameter, value)
            if state:
                self._optimizer.state[parameter] = state

    def after_reading(self) -> None:
        """Nothing is computed from the parameters."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in the unwrapped model; tied ones once."""
    return {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _flat(tensor: Tensor, to_read: bool) -> FlatTensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        assert list(local.shape[1:]) == list(tensor.shape[1:]), "only sharding by rows leaves a contiguous slice"
        row = local[0].numel() if len(local) else 0
        return FlatTensor(local.view(-1), global_offset(tensor)[0] * row, tensor.numel())
    if to_read:
        return FlatTensor.whole(tensor)
    is_distributed = dist.is_initialized() and dist.get_world_size() > 1
    return share_of(tensor, dist.get_rank() if is_distributed else 0, dist.get_world_size() if is_distributed else 1)


def is_scalar(value: Any) -> bool:
    """Whether an optimizer state is a scalar, as a tensor or as a number."""
    return not isinstance(value, Tensor) or value.ndim == 0


def as_number(value: Any) -> float:
    """A scalar optimizer state for JSON, exactly."""
    return value.item() if isinstance(value, Tensor) else value


def scalar_for(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, value: float) -> Any:
    """A scalar as this optimizer keeps it: torch's in a tensor, on the parameter's device where they are fused."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return value
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(float(value), dtype=torch.float32, device=parameter.device if on_device else "cpu")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name."""
    return getattr(torch, name)
