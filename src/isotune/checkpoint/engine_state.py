"""The training state of an engine as flat tensors and JSON, in the same form for every engine; and its plain model.

    model/NAME            a trained parameter, in fp32 where the engine trains an fp32 copy of it
    optimizer/NAME/KEY    a tensor of the optimizer's state, e.g. exp_avg
    OptimizerState        JSON: the other optimizer states, e.g. step

Frozen parameters are not part of it: they are loaded again by the recipe.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from isotune.checkpoint.flat_tensors import FlatTensor, share_of
from isotune.compat import deepspeed
from isotune.compat.torch import global_offset
from isotune.compat.transformers import set_attention_of
from isotune.distributed.ranks import several_ranks
from isotune.io.errors import UserError
from isotune.models.adapters.from_base import as_plain_adapter, first_factors

MODEL, OPTIMIZER = "model/", "optimizer/"


@dataclass
class OptimizerState:
    """State of an optimizer by parameter name and key, without the contents of its tensors."""

    # dtypes of tensors of their parameter's shape
    slots: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    # [shape, dtype] of other tensors, such as factors and quantisation tables
    others: dict[str, dict[str, list[Any]]] = field(default_factory=dict[str, dict[str, list[Any]]])
    scalars: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])  # values of scalars


class EngineState(ABC):
    """Access to the trained parameters of a model and to the state of the torch optimizer that steps over them.

    `shards` says in words what keeps the optimizer's state in shares; None where every rank has it whole.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, shards: str | None) -> None:
        self.parameters = {  # by their names in the unwrapped model; tied ones once
            name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.shards = shards
        self._optimizer = optimizer

    @abstractmethod
    def _stepped(self, parameter: nn.Parameter) -> Tensor:
        """The tensor that the optimizer steps over for a parameter: the key of its state."""

    @abstractmethod
    def _part(self, parameter: nn.Parameter, tensor: Tensor, to_read: bool) -> FlatTensor:
        """The slice for a parameter of `tensor`: of what the optimizer steps over, or of a state as long."""

    def after_reading(self) -> None:  # noqa: B027  (most engines compute nothing)
        """Update what the engine computes from the tensors that were just read."""

    def model(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """The trained parameters, sharing their memory: what this rank writes, or with `to_read` all that it needs."""
        return {MODEL + name: self._part(p, self._stepped(p), to_read) for name, p in self.parameters.items()}

    def optimizer(self, *, to_read: bool) -> dict[str, FlatTensor]:
        """The same for the optimizer's tensors."""
        return {
            f"{OPTIMIZER}{name}/{key}": self._part(p, value, to_read)
            for name, p in self.parameters.items()
            for key, value in sorted(self._state_of(p).items(), key=lambda item: item[0])
            if not _is_scalar(value)
        }

    def optimizer_state(self) -> OptimizerState:
        """The rest of the optimizer's state."""
        state = OptimizerState()
        for name, parameter in self.parameters.items():
            for key, value in self._state_of(parameter).items():
                if _is_scalar(value):
                    number = value.item() if isinstance(value, Tensor) else value
                    state.scalars.setdefault(name, {})[key] = number
                elif value.shape == self._stepped(parameter).shape:
                    state.slots.setdefault(name, {})[key] = _dtype_name(value)
                elif self.shards is None:
                    state.others.setdefault(name, {})[key] = [list(value.shape), _dtype_name(value)]
                else:
                    kind = type(self._optimizer).__name__
                    raise UserError(f"optim: {kind} keeps tensors that {self.shards} cannot save: use adamw_torch")
        return state

    @torch.no_grad()
    def make_optimizer_state(self, saved: OptimizerState) -> None:
        """Create the state of an optimizer that has not stepped yet; `read_tensors` then fills its tensors."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        # torch's optimizers keep scalars in tensors, on the device where they are fused
        in_tensors = type(self._optimizer).__module__.startswith("torch.optim")
        made: set[int] = set()  # under ZeRO several parameters share a tensor
        for name, parameter in self.parameters.items():
            stepped = self._stepped(parameter)
            if id(stepped) in made:
                continue
            state: dict[str, Any] = {}
            for key, dtype in saved.slots.get(name, {}).items():
                slot = torch.zeros_like(stepped, dtype=getattr(torch, dtype), requires_grad=False)
                state[key] = _as_factor(key, slot)
            for key, (shape, dtype) in saved.others.get(name, {}).items():
                state[key] = torch.zeros(shape, dtype=getattr(torch, dtype), device=stepped.device)
            group = groups.get(id(stepped), self._optimizer.param_groups[0])
            device = stepped.device if group.get("fused") or group.get("capturable") else "cpu"
            for key, value in saved.scalars.get(name, {}).items():
                number = torch.tensor(float(value), dtype=torch.float32, device=device)
                state[key] = number if in_tensors else value
            if state:
                self._optimizer.state[stepped] = state
                made.add(id(stepped))

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self._optimizer.state.get(self._stepped(parameter), {})


class TorchState(EngineState):
    """Plain training, DDP, FSDP2 and DeepSpeed without ZeRO: a torch optimizer over the parameters themselves."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        is_sharded = any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
        super().__init__(model, optimizer, shards="a sharded engine" if is_sharded else None)

    def _stepped(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def _part(self, parameter: nn.Parameter, tensor: Tensor, to_read: bool) -> FlatTensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            assert list(local.shape[1:]) == list(tensor.shape[1:]), "only sharding by rows leaves a contiguous slice"
            row = local[0].numel() if len(local) else 0
            return FlatTensor(local.view(-1), global_offset(tensor)[0] * row, tensor.numel())
        if to_read:
            return FlatTensor.whole(tensor)
        return share_of(tensor, dist.get_rank(), dist.get_world_size()) if several_ranks() else share_of(tensor, 0, 1)


class ZeroState(EngineState):
    """ZeRO: the optimizer steps over long flat fp32 tensors, in each of which this rank has parameters' slices.

    Under ZeRO-1 and 2 it owns a stretch of each flat tensor, and so a fragment of some parameters; under ZeRO-3 a part
    of every parameter. Raises UserError where the optimizer of ZeRO-3 is on NVMe.
    """

    def __init__(self, model: nn.Module, zero: Any) -> None:
        super().__init__(model, zero.optimizer, shards="ZeRO")
        self._zero, self._is_stage_3 = zero, hasattr(zero, "fp32_partitioned_groups_flat")
        if self._is_stage_3 and deepspeed.offloads_to_nvme(zero):
            raise UserError("offload to NVMe cannot be checkpointed: offload to cpu instead")
        groups = zero.fp16_groups if self._is_stage_3 else zero.bit16_groups
        flats = zero.fp32_partitioned_groups_flat if self._is_stage_3 else zero.single_partition_of_fp32_groups
        self._flat_of = {id(p): flat for group, flat in zip(groups, flats, strict=True) for p in group}

    def _stepped(self, parameter: nn.Parameter) -> Tensor:
        return self._flat_of[id(parameter)]

    def _part(self, parameter: nn.Parameter, tensor: Tensor, to_read: bool) -> FlatTensor:
        whole: Any = parameter
        own = deepspeed.zero3_slice(self._zero, whole) if self._is_stage_3 else deepspeed.zero12_slice(whole)
        size = whole.ds_numel if self._is_stage_3 else whole.numel()
        return FlatTensor(tensor.detach().narrow(0, own.flat_start, own.length), own.start, size)

    def after_reading(self) -> None:
        """Round the model's 16-bit parameters again, and gather what every rank keeps whole."""
        if self._is_stage_3:
            deepspeed.zero3_after_load(self._zero)
        else:
            deepspeed.zero12_after_load(self._zero)


def state_of(model: nn.Module, optimizer: Any) -> EngineState:
    """The state of a prepared model, out of its wrapper, and its optimizer; UserError for one of DeepSpeed's others."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat") or hasattr(optimizer, "single_partition_of_fp32_groups"):
        return ZeroState(model, optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchState(model, optimizer)
    raise UserError(f"{type(optimizer).__name__} cannot be checkpointed: use ZeRO stage 1, 2 or 3, or DDP")


def plain_model(model: nn.Module, *, keep: bool) -> nn.Module | None:
    """`model`, out of its engine's wrapper, where it is whole on this rank, else a plain copy of it in host memory.

    Under ZeRO-3 and FSDP2 no rank holds the whole weights, and in 16-bit DeepSpeed the model has rounded copies of the
    fp32 parameters that are trained. One parameter after the other is gathered on every rank. The copy of a `PeftModel`
    has memory for its trained tensors only; that of another model has its frozen ones too, in fp32 beside fp32 copies,
    because files of mixed dtypes are loaded in one. An adapter that took its start out of the base is a copy too, the
    one that fits the base as it is published. Collective: every rank must call it, and those that do not `keep` the
    result get None.
    """
    reshard(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = first_factors(model)
    masters = any(deepspeed.is_partitioned(p) or deepspeed.has_fp32_copy(p) for p in trained.values())
    if not (factors or masters or any(isinstance(p, DTensor) for p in trained.values())):
        return model if keep else None
    wanted = trained if hasattr(model, "peft_config") else dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in wanted.items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else deepspeed.gather_fp32(parameter)
        if masters and not parameter.requires_grad:
            whole = whole.float()
        if keep:
            tensors[name] = whole.detach().to("cpu", copy=True)
        del whole
    if not keep:
        return None
    if factors:
        settings: Any = model.peft_config["default"]  # type: ignore[index]  (torch declares attributes as tensors)
        return _copy_with(model, *as_plain_adapter(tensors, settings, factors))
    return _copy_with(model, tensors)


def reshard(model: nn.Module) -> None:
    """Shard the outermost weights again, which FSDP2 leaves whole after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _copy_with(model: Any, tensors: dict[str, torch.Tensor], adapter_settings: Any = None) -> nn.Module:
    """A model of the same class and configuration with `tensors`; parameters that they do not name stay on meta.

    Its adapter is as `adapter_settings` say, by default as the model's.
    """
    adapter = hasattr(model, "peft_config")
    base = model.get_base_model() if adapter else model
    config = copy.deepcopy(base.config)
    set_attention_of(config, "eager")
    # the model's own class: FSDP2 replaces it by a class derived from it
    plain_class: Any = next(cls for cls in type(base).__mro__ if not cls.__name__.startswith("FSDP"))
    with torch.device("meta"):
        fresh = plain_class(config)
    if hasattr(base, "generation_config"):  # a classifier has none
        fresh.generation_config = base.generation_config
    if adapter:
        from peft import get_peft_model

        with torch.device("meta"):
            settings = copy.deepcopy(adapter_settings or model.peft_config["default"])
            fresh = cast(Any, get_peft_model)(fresh, settings, low_cpu_mem_usage=True)
        settings.base_model_name_or_path = model.peft_config["default"].base_model_name_or_path
    unknown = fresh.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    assert not unknown, f"{unknown[0]} has no place in a plain {type(fresh).__name__}"
    if not adapter:
        fresh.tie_weights()
        for name, buffer in base.named_buffers():
            if name in fresh.state_dict():
                module, _, leaf = name.rpartition(".")
                setattr(fresh.get_submodule(module), leaf, buffer.detach().cpu())
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(name in tensors)
    return fresh


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.ndim == 0


def _as_factor(key: str, slot: Tensor) -> Tensor:
    """A slot as Adafactor has it: earlier versions took its factors for slots where one of two sides is 1."""
    if key == "exp_avg_sq_row":
        return slot.reshape(slot.shape[:-1])
    if key == "exp_avg_sq_col":
        return slot.reshape(*slot.shape[:-2], slot.shape[-1])
    return slot


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
