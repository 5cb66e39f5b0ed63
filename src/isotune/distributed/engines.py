"""What the prepared objects really are, beside what was asked: a difference stops the run before its first step.

accelerate and DeepSpeed each take settings from several places and say nothing where one loses. So nothing here is read
from a configuration: the engine, its stage, its clipping, its precision and its shares are read from the model and the
optimizer that will train.
"""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import offloaded
from isotune.distributed.launch import Process
from isotune.io.errors import RunFault


@dataclass(frozen=True)
class EngineInEffect:
    """Read back after preparation.

    Attributes:
        kind: plain, DDP, DeepSpeed or FSDP.
        engine: class of the prepared model.
        zero_stage: of DeepSpeed, else None.
        offload: parts that lie in host memory: optimizer, param.
        world_size: ranks that share the work.
        precision: no, bf16 or fp16.
        max_grad_norm: what gradients are clipped to; 0 clips nothing.
        optimizer: class of the optimizer that updates the numbers.
        accumulation: microbatches that the engine itself would add up; the plan does it, so 1.
        parameter_bytes_per_rank: of weights that this rank holds between two steps.
        optimized_numbers_per_rank: fp32 numbers that this rank's optimizer updates.
    """

    kind: str
    engine: str
    zero_stage: int | None
    offload: list[str]
    world_size: int
    precision: str
    max_grad_norm: float
    optimizer: str
    accumulation: int
    parameter_bytes_per_rank: int
    optimized_numbers_per_rank: int

    def as_dict(self) -> dict[str, Any]:
        """For environment.json."""
        return asdict(self)


def read_back(trainer: Any) -> EngineInEffect:
    """What is in effect, after `trainer` prepared its model and optimizer."""
    model, accelerator = trainer.model_wrapped, trainer.accelerator
    inner = accelerator.unwrap_model(model)
    kind = _kind(model)
    if kind == "DeepSpeed":
        optimizer = model.basic_optimizer
        precision = "fp16" if model.fp16_enabled() else "bf16" if model.bfloat16_enabled() else "no"
        clipping = float(getattr(model.optimizer, "clip_grad", model.gradient_clipping()) or 0.0)
    else:
        optimizer = trainer.optimizer
        precision, clipping = accelerator.mixed_precision, float(trainer.args.max_grad_norm or 0.0)
    return EngineInEffect(
        kind=kind,
        engine=type(model).__name__,
        zero_stage=int(model.zero_optimization_stage()) if kind == "DeepSpeed" else None,
        offload=_offload(model, inner) if kind in ("DeepSpeed", "FSDP") else [],
        world_size=_world_size(model, kind, accelerator),
        precision=precision,
        max_grad_norm=clipping,
        optimizer=type(_bare(optimizer)).__name__,
        accumulation=model.gradient_accumulation_steps()
        if kind == "DeepSpeed"
        else trainer.accelerator.gradient_accumulation_steps,
        parameter_bytes_per_rank=sum(_held(p) * p.element_size() for p in inner.parameters()),
        optimized_numbers_per_rank=_optimized(model, _bare(optimizer), kind),
    )


def check_engine(found: EngineInEffect, trainer: Any, recipe: RunRecipe, process: Process) -> None:
    """Stop where what runs is not what was asked.

    Raises:
        RunFault: the first difference, with its key.
    """
    asked_optimizer = trainer.get_optimizer_cls_and_kwargs(trainer.args)[0].__name__
    asked = {
        "kind": ("engine", _asked_kind(process)),
        "zero_stage": ("zero_optimization.stage", process.zero_stage),
        "offload": ("zero_optimization.offload_*", offloaded(process.deepspeed_config)),
        "world_size": ("world size", int(os.environ.get("WORLD_SIZE", "1"))),
        "precision": ("precision", "bf16" if recipe.bf16 else "fp16" if recipe.fp16 else "no"),
        "max_grad_norm": ("max_grad_norm", float(recipe.training_arguments["max_grad_norm"])),
        "optimizer": ("optim (zero_force_ds_cpu_optimizer: false leaves it alone)", asked_optimizer),
        "accumulation": ("gradient_accumulation_steps", 1),
    }
    for name, (key, wanted) in asked.items():
        is_so = getattr(found, name)
        if name == "offload" and process.fsdp:
            continue  # accelerate's own key, with no effect on any number
        if is_so != wanted:
            raise RunFault(f"{key} is {is_so} after preparation, and {wanted} was asked; nothing was trained")


def whole_numel(parameter: Any) -> int:
    """Numbers of a parameter over all ranks: under ZeRO-3 it is empty itself between two passes."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def _kind(model: nn.Module) -> str:
    if type(model).__module__.startswith("deepspeed."):
        return "DeepSpeed"
    if isinstance(model, FSDPModule):
        return "FSDP"
    return "DDP" if isinstance(model, DistributedDataParallel) else "plain"


def _asked_kind(process: Process) -> str:
    if process.deepspeed:
        return "DeepSpeed"
    if process.fsdp:
        return "FSDP"
    # a launch of one process has a group too where its configuration is for several, and accelerate wraps for a group
    grouped = process.world_size > 1 or ("WORLD_SIZE" in os.environ and torch.distributed.is_initialized())
    return "DDP" if grouped else "plain"


def _world_size(model: Any, kind: str, accelerator: Any) -> int:
    """Of the group that the engine reduces over, where it has one of its own."""
    if kind == "DeepSpeed":
        return int(model.dp_world_size)
    if kind == "DDP":
        return torch.distributed.get_world_size(model.process_group)
    return int(accelerator.num_processes)


def _bare(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _offload(model: Any, inner: nn.Module) -> list[str]:
    if isinstance(model, FSDPModule):
        on_host = model._get_fsdp_state()._fsdp_param_group
        return (
            ["param", "optimizer"]
            if on_host is not None and on_host.offload_policy.__class__.__name__ == "CPUOffloadPolicy"
            else []
        )
    optimizer = model.optimizer
    parts = {
        "optimizer": getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False),
        "param": getattr(optimizer, "offload_param", False),
    }
    return [part for part, is_so in parts.items() if is_so]


def _held(parameter: Any) -> int:
    """Numbers of a parameter that lie on this rank between two steps."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.numel() or parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def _optimized(model: Any, optimizer: Any, kind: str) -> int:
    if kind == "DeepSpeed":
        for shares in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if (held := getattr(model.optimizer, shares, None)) is not None:
                return sum(share.numel() for share in held)
    return sum(_held(p) for group in optimizer.param_groups for p in group["params"])
