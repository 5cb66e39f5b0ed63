"""The training state of an engine as flat tensors and plain numbers, the same whichever engine holds it.

    model/NAME            a trained parameter, in fp32 where the engine keeps such a master copy
    optimizer/NAME/KEY    what the optimizer keeps for each of its numbers, e.g. exp_avg
    numbers               JSON: what the optimizer keeps besides, e.g. step

Frozen parameters are not part of it: the recipe says where they come from.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from isotune.checkpoint.flat_tensors import FlatTensor, share_of
from isotune.io.errors import UserError

MODEL, OPTIMIZER = "model/", "optimizer/"


@dataclass
class OptimizerNumbers:
    """What an optimizer keeps for the parameters, by their names, without the tensors' contents.

    Attributes:
        slots: types of the tensors that are as long as their parameter.
        others: [shape, type] of tensors that are not, such as factors and quantisation tables.
        scalars: numbers.
    """

    slots: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class EngineState(Protocol):
    """Where an engine keeps its state."""

    def model(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """The trained parameters: this rank's part to write, or all that it needs to read, sharing their memory."""
        ...

    def optimizer(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """The same of the optimizer's tensors."""
        ...

    def numbers(self) -> OptimizerNumbers:
        """Everything else that the optimizer keeps."""
        ...

    def make_optimizer_state(self, numbers: OptimizerNumbers) -> None:
        """Give the optimizer, which may not have stepped yet, the tensors and numbers of a checkpoint, to be filled."""
        ...

    def after_reading(self) -> None:
        """Bring whatever is computed from the tensors just read up to date."""
        ...


class TorchState:
    """Plain training, DDP, FSDP2 and unsharded DeepSpeed: parameters and a torch optimizer over just these."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.names = trained_parameters(model)
        self._optimizer = optimizer
        self._sharded = any(isinstance(p, DTensor) for p in self.names.values())

    def model(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {MODEL + name: _flat(parameter, to_read) for name, parameter in self.names.items()}

    def optimizer(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """See `EngineState`."""
        return {
            f"{OPTIMIZER}{name}/{key}": _flat(value, to_read)
            for name, parameter in self.names.items()
            for key, value in sorted(self._optimizer.state.get(parameter, {}).items(), key=lambda item: item[0])
            if not is_scalar(value)
        }

    def numbers(self) -> OptimizerNumbers:
        """See `EngineState`."""
        found = OptimizerNumbers()
        for name, parameter in self.names.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if is_scalar(value):
                    found.scalars.setdefault(name, {})[key] = as_number(value)
                elif value.numel() == parameter.numel():
                    found.slots.setdefault(name, {})[key] = dtype_name(value.dtype)
                elif self._sharded:
                    raise UserError(
                        f"optim: {type(self._optimizer).__name__} keeps tensors that a sharded engine cannot save: "
                        "use adamw_torch"
                    )
                else:
                    found.others.setdefault(name, {})[key] = [list(value.shape), dtype_name(value.dtype)]
        return found

    @torch.no_grad()
    def make_optimizer_state(self, numbers: OptimizerNumbers) -> None:
        """See `EngineState`."""
        groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        for name, parameter in self.names.items():
            state: dict[str, Any] = {}
            for key, dtype in numbers.slots.get(name, {}).items():
                state[key] = torch.zeros_like(parameter, dtype=dtype_of(dtype), requires_grad=False)
            for key, (shape, dtype) in numbers.others.get(name, {}).items():
                state[key] = torch.zeros(shape, dtype=dtype_of(dtype), device=parameter.device)
            for key, value in numbers.scalars.get(name, {}).items():
                state[key] = scalar_for(self._optimizer, groups[parameter], parameter, value)
            if state:
                self._optimizer.state[parameter] = state

    def after_reading(self) -> None:
        """Nothing is computed from the parameters."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by the names that the model had before any engine wrapped it; tied ones once."""
    return {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _flat(tensor: Tensor, to_read: bool) -> FlatTensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
        assert list(local.shape[1:]) == list(tensor.shape[1:]), "only sharding by rows leaves a contiguous slice"
        row = local[0].numel() if len(local) else 0
        return FlatTensor(local.view(-1), offsets[0] * row, tensor.numel())
    if to_read:
        return FlatTensor.whole(tensor)
    several = dist.is_initialized() and dist.get_world_size() > 1
    return share_of(tensor, dist.get_rank() if several else 0, dist.get_world_size() if several else 1)


def is_scalar(value: Any) -> bool:
    """Whether an entry of an optimizer's state is a number, in a tensor or not."""
    return not isinstance(value, Tensor) or value.ndim == 0


def as_number(value: Any) -> float:
    """A scalar of an optimizer's state for JSON, exactly."""
    return value.item() if isinstance(value, Tensor) else value


def scalar_for(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, value: float) -> Any:
    """A number as this optimizer keeps it: torch's own hold it in a tensor, beside the parameter where they fuse."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return value
    beside = group.get("fused") or group.get("capturable")
    return torch.tensor(float(value), dtype=torch.float32, device=parameter.device if beside else "cpu")


def dtype_name(dtype: torch.dtype) -> str:
    """A type as text."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The type of that text."""
    return getattr(torch, name)
