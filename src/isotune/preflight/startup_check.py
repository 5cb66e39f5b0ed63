"""The memory check of a training script before it loads the model; with `--plan_only` the whole preflight report."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import offloaded
from isotune.distributed.launch import Process
from isotune.io.errors import UserError
from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.render import format_bytes, render_report
from isotune.preflight.request import DDP, DEEPSPEED, FSDP, PLAIN, Launch, PreflightRequest
from isotune.preflight.resources.activation_memory import MicrobatchMemory
from isotune.preflight.resources.memory import estimate_memory
from isotune.preflight.resources.sharding import Sharding, model_stats


def startup_check(recipe: RunRecipe, config: PreTrainedConfig, data: Any, process: Process) -> bool:
    """Print the memory of weights, gradients and optimizer, and say whether `--plan_only` stops the script now.

    Activations are not counted; the data are prepared. Raises UserError if that alone is more than the device has.
    """
    launch = _launch_of(process)
    limit = torch.cuda.get_device_properties(process.device).total_memory if process.device.type == "cuda" else None
    if recipe.plan_only:
        if process.is_main:
            report = run_preflight(PreflightRequest(recipe, launch, ()), limit=limit, prepared=data)
            print(render_report(report, None), flush=True)
        return True
    stats = model_stats(recipe, config, getattr(data.train, "num_labels", None))
    memory = estimate_memory(Sharding(recipe, stats, launch), MicrobatchMemory(0, 0), 2, on_cpu=limit is None)
    optimizer = memory.optimizer + memory.master_copies
    fixed = memory.weights + memory.gradients + optimizer
    if process.is_main:
        print(
            f"memory      {format_bytes(fixed)} on a process before activations: "
            f"weights {format_bytes(memory.weights)}, gradients {format_bytes(memory.gradients)}, "
            f"optimizer {format_bytes(optimizer)}",
            flush=True,
        )
    if limit is not None and fixed > limit:
        raise UserError(
            f"weights, gradients and optimizer take {format_bytes(fixed)} on a process, and the device has "
            f"{format_bytes(limit)}: `isotune plan` says which changes fit"
        )
    return False


def _launch_of(process: Process) -> Launch:
    if process.deepspeed:
        config = process.deepspeed_config
        return Launch(DEEPSPEED, process.world_size, "as launched", config, tuple(offloaded(config)))
    engine = FSDP if process.fsdp else DDP if process.world_size > 1 else PLAIN
    return Launch(engine, process.world_size, "as launched")
