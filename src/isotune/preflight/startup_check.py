"""What a training script does once its run has started: data, memory check, `microbatch_tokens: auto`, then training.

With `--plan_only` the whole preflight report instead of training.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from isotune.data.documents import RunData
from isotune.distributed.deepspeed_config import offloaded
from isotune.distributed.launch import Process
from isotune.distributed.ranks import least_of_ranks
from isotune.io.errors import UserError
from isotune.preflight.microbatch_size import choose_microbatch_tokens, launch_that_decides
from isotune.preflight.preflight_report import Estimator, NotTraced, run_preflight
from isotune.preflight.render import render_report
from isotune.preflight.request import DDP, DEEPSPEED, FSDP, PLAIN, Launch, PreflightRequest
from isotune.preflight.resources.activation_memory import MicrobatchMemory
from isotune.preflight.resources.memory import estimate_memory, format_bytes
from isotune.preflight.resources.sharding import Sharding
from isotune.run.finishing import FinishingStep, finish_trained
from isotune.training.failures.out_of_memory import MemoryPlan
from isotune.training.from_recipe import Start, train_run


def train_checked(start: Start, prepare: Callable[[], RunData], finishing: Sequence[FinishingStep]) -> None:
    """Prepare the data, check the memory, train and finish; a run that is trained is only finished.

    Every rank calls it.
    """
    if start.run.is_trained:
        finish_trained(start.run, start.process, finishing)
        return
    start.process.watchdog.enter("the preparation of the data")
    data = prepare()
    checked = startup_check(start, data)
    if checked is not None:
        train_run(checked, data, finishing)


def startup_check(start: Start, data: RunData) -> Start | None:
    """Print the memory of weights, gradients and optimizer; None where `--plan_only` stops the script now.

    Returns the start with what the data decided, and with the number of tokens in place of `microbatch_tokens: auto`.
    The data are prepared; every rank calls it. Activations are not part of the printed memory. Raises UserError if that
    alone is more than the device has, or the first microbatch is, where no smaller one can be tried.
    """
    if data.found:
        start = start.with_values(**data.found)
    recipe, process, launch = start.recipe, start.process, _launch_of(start.process)
    cuda = process.device.type == "cuda"
    limit = torch.cuda.get_device_properties(process.device).total_memory if cuda else None
    if recipe.plan_only:
        if process.is_main:
            report = run_preflight(
                PreflightRequest(recipe, launch, ()), limit=limit, prepared=data, new_rows=start.new_rows
            )
            print(render_report(report, None), flush=True)
        return None
    estimator = Estimator(recipe, start.config, data, on_cpu=limit is None, new_rows=start.new_rows)
    memory = estimate_memory(Sharding(recipe, estimator.stats, launch), MicrobatchMemory(0, 0), 2, on_cpu=limit is None)
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
    has = f" of {format_bytes(limit)}" if limit is not None else ""

    def says(tokens: int) -> str:
        try:
            planned = estimator.memory(recipe.with_values(microbatch_tokens=tokens), launch).total
        except NotTraced as error:
            return str(error)
        return f"the plan is {format_bytes(planned)}{has} on a process"

    start = dataclasses.replace(start, memory=MemoryPlan(says, memory.optimizer))
    if recipe.microbatch_tokens != "auto":
        return start
    decides = launch_that_decides(recipe, launch)
    tokens, why = start.recorded.get("microbatch_tokens"), "as this run began"
    if not isinstance(tokens, int):
        if limit is not None and decides is launch:  # bits are promised for a kind of device, not for what is free now
            limit = least_of_ranks(torch.cuda.mem_get_info(process.device)[0], process.device)
        try:
            tokens, found = choose_microbatch_tokens(recipe, launch, limit, estimator.memory)
            why = f"{format_bytes(found.total)} of {format_bytes(limit or 0)} on a process" if found else "one row"
            if found and decides is not launch and launch.engine != PLAIN:
                why += "; by a plain process's memory, as exact_gradients has the same bits on any launch"
        except NotTraced as error:
            tokens, why = recipe.max_seq_length, f"one row: {error}"
    if process.is_main:
        print(f"microbatch  {tokens:,} tokens, by microbatch_tokens: auto ({why})", flush=True)
    return start.with_values(microbatch_tokens=tokens)


def _launch_of(process: Process) -> Launch:
    if process.deepspeed:
        config = process.deepspeed_config
        return Launch(DEEPSPEED, process.world_size, "as launched", config, tuple(offloaded(config)))
    engine = FSDP if process.fsdp else DDP if process.world_size > 1 else PLAIN
    return Launch(engine, process.world_size, "as launched")
