"""The plan that a training script makes before it loads a model: printed in short, in full with `--plan_only`."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import offloaded
from isotune.distributed.launch import Process
from isotune.io.errors import UserError
from isotune.preflight.launches import DDP, DEEPSPEED, FSDP, PLAIN, Launch
from isotune.preflight.render import page, size
from isotune.preflight.request import Asked
from isotune.preflight.resources.activation_memory import PassMemory
from isotune.preflight.resources.memory import plan_memory
from isotune.preflight.resources.model_stats import builder, model_facts
from isotune.preflight.run_plan import plan_run


def startup_check(recipe: RunRecipe, config: PreTrainedConfig, data: Any, process: Process) -> bool:
    """Say what the run will hold, and refuse what has no room: what is counted exactly, without activations.

    Args:
        recipe, config, data: the run's own, the data prepared.
        process: this one; the launch that it stands in is planned.

    Returns:
        whether the script is to stop here, as `--plan_only` asks.

    Raises:
        UserError: weights, gradients and optimizer alone are more than the device has.
    """
    launch = launch_of(process)
    limit = torch.cuda.get_device_properties(process.device).total_memory if process.device.type == "cuda" else None
    if recipe.plan_only:
        if process.is_main:
            print(page(plan_run(Asked(recipe, launch, ()), limit=limit, prepared=data), None), flush=True)
        return True
    labels = getattr(data.train, "num_labels", None)
    facts = model_facts(recipe, config, builder(recipe, config, labels)(config.num_hidden_layers))
    memory = plan_memory(recipe, launch, facts, PassMemory(0, 0), 2, on_cpu=limit is None)
    fixed = memory.weights + memory.gradients + memory.optimizer + memory.master_copies
    if process.is_main:
        print(
            f"memory      {size(fixed)} on a process before activations: weights {size(memory.weights)}, gradients "
            f"{size(memory.gradients)}, optimizer {size(memory.optimizer + memory.master_copies)}",
            flush=True,
        )
    if limit is not None and fixed > limit:
        raise UserError(
            f"weights, gradients and optimizer take {size(fixed)} on a process, and the device has {size(limit)}: "
            "`isotune plan` says which changes fit"
        )
    return False


def launch_of(process: Process) -> Launch:
    """The launch that this process stands in."""
    if process.deepspeed:
        config = process.deepspeed_config
        return Launch(DEEPSPEED, process.world_size, "as launched", config, tuple(offloaded(config)))
    engine = FSDP if process.fsdp else DDP if process.world_size > 1 else PLAIN
    return Launch(engine, process.world_size, "as launched")
