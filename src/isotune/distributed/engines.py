"""Compare the engine that runs with the engine that the recipe asks for; a difference stops the run at its start.

accelerate and DeepSpeed each read settings from several places and do not report which one wins. So this module reads
no configuration: engine, ZeRO stage, clipping, precision and shards come from the prepared model and optimizer.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from isotune.compat.deepspeed import accumulation_dtypes
from isotune.compat.torch import fsdp2_offloads, fsdp2_policies
from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import gradient_dtypes, offloaded
from isotune.distributed.launch import Process
from isotune.io.errors import RunFault

PRECISIONS = {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def is_wrapped_in_place(model: Any) -> bool:
    """Whether an engine has made the model its own without putting another around it, as FSDP2 does."""
    return isinstance(model, FSDPModule)


def read_back(trainer: Any) -> dict[str, Any]:
    """The engine in effect, after `trainer` has prepared its model and optimizer, as environment.json names it.

    `accumulation` is the engine's own, 1, because the step schedule accumulates. Per rank there are the bytes of the
    weights that it holds between two steps, and the fp32 elements that its optimizer updates.
    """
    model, accelerator = trainer.model_wrapped, trainer.accelerator
    kind, stage, offload = "plain", None, []
    world_size, precision = int(accelerator.num_processes), accelerator.mixed_precision
    clipping, accumulation = float(trainer.args.max_grad_norm or 0.0), accelerator.gradient_accumulation_steps
    optimizer = _innermost(trainer.optimizer)
    weight_types: set[Any] = {p.dtype for p in model.parameters() if p.requires_grad}
    accumulation_types, reduction_types, output_types = weight_types, weight_types, set[Any]()
    if type(model).__module__.startswith("deepspeed."):
        kind, stage, zero = "DeepSpeed", int(model.zero_optimization_stage()), model.optimizer
        parts = {
            "optimizer": getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False),
            "param": getattr(zero, "offload_param", False),
        }
        offload = [part for part, is_offloaded in parts.items() if is_offloaded]
        world_size = int(model.dp_world_size)
        precision = "fp16" if model.fp16_enabled() else "bf16" if model.bfloat16_enabled() else "no"
        clipping = float(getattr(model.optimizer, "clip_grad", model.gradient_clipping()) or 0.0)
        accumulation = model.gradient_accumulation_steps()
        optimizer = _innermost(model.basic_optimizer)
        accumulation_types = accumulation_dtypes(model, coalesces=trainer.update.sync.coalesces)
        reduction_types = {model.communication_data_type}
    elif isinstance(model, FSDPModule):
        kind, offload = "FSDP", ["param", "optimizer"] if fsdp2_offloads(model) else []
        policies = fsdp2_policies(model)
        precision = " and ".join(sorted(PRECISIONS[policy.param_dtype] for policy in policies))
        accumulation_types = {policy.reduce_dtype or policy.param_dtype for policy in policies} - {None} or weight_types
        reduction_types, output_types = accumulation_types, {policy.output_dtype for policy in policies} - {None}
    elif isinstance(model, DistributedDataParallel):
        kind, world_size = "DDP", torch.distributed.get_world_size(model.process_group)
    elif isinstance(model, DataParallel):
        kind = "DataParallel"
    weights = accelerator.unwrap_model(model).parameters()
    return {
        "kind": kind,  # plain, DDP, DeepSpeed or FSDP; DataParallel, which `check_engine` refuses
        "engine": type(model).__name__,
        "zero_stage": stage,
        "offload": offload,  # parts in host memory
        "world_size": world_size,  # ranks of the group that the engine reduces over
        "precision": precision,
        "accumulation_dtype": _names(accumulation_types),  # of the gradients of an update's microbatches
        "reduction_dtype": _names(reduction_types),  # of the ranks' gradients
        "output_dtype": _names(output_types) or None,  # what the engine rounds the model's outputs to, the loss too
        "max_grad_norm": clipping,  # 0 clips nothing
        "optimizer": type(optimizer).__name__,
        "accumulation": accumulation,
        "parameter_bytes_per_rank": sum(_local_numel(p) * p.element_size() for p in weights),
        "optimized_numbers_per_rank": _optimized_numel(model, optimizer),
    }


def check_engine(engine: dict[str, Any], trainer: Any, recipe: RunRecipe, process: Process) -> None:
    """RunFault where the engine in effect is not the one that was asked for; it names the first key that differs."""
    # accelerate wraps for DDP wherever there is a process group, also for one process under a multi-GPU configuration
    grouped = process.world_size > 1 or ("WORLD_SIZE" in os.environ and torch.distributed.is_initialized())
    kind = "DeepSpeed" if process.deepspeed else "FSDP" if process.fsdp else "DDP" if grouped else "plain"
    optimizer = trainer.get_optimizer_cls_and_kwargs(trainer.args)[0].__name__
    sums = gradient_dtypes(process.deepspeed_config) if process.deepspeed_config else ("float32", "float32")
    expected_values = {
        "kind": ("engine", kind),
        "zero_stage": ("zero_optimization.stage", process.zero_stage),
        "offload": ("zero_optimization.offload_*", offloaded(process.deepspeed_config)),
        "world_size": ("world size", int(os.environ.get("WORLD_SIZE", "1"))),
        "precision": ("precision", recipe.mixed_precision),
        "accumulation_dtype": ("the type that gradients of microbatches add up in", sums[0]),
        "reduction_dtype": ("the type that gradients of processes add up in", sums[1]),
        "output_dtype": ("the type that the loss is rounded to", None),
        "max_grad_norm": ("max_grad_norm", float(recipe.training_arguments["max_grad_norm"])),
        "optimizer": ("optim (zero_force_ds_cpu_optimizer: false leaves it alone)", optimizer),
        "accumulation": ("gradient_accumulation_steps", 1),
    }
    for name, (key, expected) in expected_values.items():
        actual = engine[name]
        if name == "offload" and process.fsdp:
            continue  # accelerate's own key, which changes no result
        if actual != expected:
            raise RunFault(f"{key} is {actual} after preparation, and {expected} was asked; nothing was trained")


def _names(types: Iterable[Any]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))


def whole_numel(parameter: Any) -> int:
    """Elements of a parameter over all ranks; a ZeRO-3 parameter itself is empty outside of a forward or backward."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _local_numel(parameter: Any) -> int:
    """Elements of a parameter that this rank holds between two steps."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.numel() or parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def _optimized_numel(model: Any, optimizer: Any) -> int:
    # where DeepSpeed's optimizers of stage 3, of stages 1 and 2, and of bf16 keep the fp32 parameters
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if (partitions := getattr(getattr(model, "optimizer", None), attribute, None)) is not None:
            return sum(partition.numel() for partition in partitions)
    return sum(_local_numel(p) for group in optimizer.param_groups for p in group["params"])
