"""A whole plan: the recipe and launch as they would be, their mistakes, the work, the memory and the time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.config.kinds import project_of
from isotune.data.run_data import prepare_run_data
from isotune.io.errors import UserError
from isotune.models.opening import compute_dtype, load_config, load_tokenizer
from isotune.preflight.launches import DDP, DEEPSPEED, FSDP, PLAIN, Launch, read_launch
from isotune.preflight.request import Asked
from isotune.preflight.resources.activation_memory import PassMemory, trace_pass
from isotune.preflight.resources.compute import USUAL_SHARE, Device, StepTime, measured_share, step_time
from isotune.preflight.resources.memory import STATE_BYTES, Memory, plan_memory
from isotune.preflight.resources.model_stats import ModelStats, builder, model_facts
from isotune.preflight.resources.work import Work, checkpoint_bytes, count_work, most_checkpoints_at_once
from isotune.preflight.suggestions import Suggestion, find_remedies

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


@dataclass(frozen=True)
class Row:
    """One line of a comparison: an engine on a number of processes."""

    launch: Launch
    memory: Memory
    time: StepTime | None


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before it.

    Attributes:
        work, why_no_work: counts, or the sentence that says why the data could not be counted.
        share, share_is_measured: of the device's peak.
        disk_bytes: checkpoints under the keep rule, the one being written included.
        rows: the comparison, where one was asked for.
    """

    asked: Asked
    model: ModelStats
    memory: Memory
    work: Work | None
    why_no_work: str | None
    device: Device | None
    share: float
    share_is_measured: bool
    time: StepTime | None
    limit: int | None
    remedies: tuple[Suggestion, ...]
    checkpoint_bytes: int
    disk_bytes: int
    rows: tuple[Row, ...]

    @property
    def fits(self) -> bool | None:
        """Whether a process has room; None where no limit is known."""
        return None if self.limit is None else self.memory.total <= self.limit

    @property
    def hours(self) -> float | None:
        """Expected hours of all steps."""
        return self.work.steps * self.time.expected / 3600 if self.work and self.time else None


def plan_run(
    asked: Asked,
    *,
    limit: int | None = None,
    device: Device | None = None,
    measured: Path | None = None,
    per_node: int = 8,
    compare: Sequence[str] = (),
    world_sizes: Sequence[int] = (),
    show_progress: bool = True,
    prepared: Any = None,
) -> RunPlan:
    """Plan a run whose recipe names at least a model and data.

    Args:
        limit: bytes of a process's memory; the device's where it is not given.
        device: for the time.
        measured: a finished run whose speed counts.
        per_node: processes of a node.
        compare, world_sizes: engines and numbers of processes to put side by side.
        show_progress: of preparing the data.
        prepared: the data, where they are prepared already.

    Raises:
        UserError: no such model, or a name that is none.
    """
    recipe, launch = asked.recipe, asked.launch
    config = load_config(recipe)
    data, why = (prepared, None) if prepared is not None else _data(recipe, show_progress)
    labels = getattr(getattr(data, "train", None), "num_labels", None)
    build = builder(recipe, config, labels)
    facts = model_facts(recipe, config, build(config.num_hidden_layers))
    works: dict[int, Work] = {}

    def counted_work(other: RunRecipe, world_size: int) -> Work | None:
        """The recipe's own is counted once for each number of processes, whatever the engine."""
        if data is None:
            return None
        if other is not recipe:
            return count_work(other, data, world_size)
        if world_size not in works:
            works[world_size] = count_work(recipe, data, world_size)
        return works[world_size]

    work = counted_work(recipe, launch.world_size)
    on_cpu = device is None and limit is None
    traced: dict[tuple, PassMemory] = {}

    def memory(other: RunRecipe, launched: Launch) -> Memory:
        same = other is recipe
        counted = facts if same else model_facts(other, config, builder(other, config, labels)(facts.layers))
        passes = 2
        longest = _fullest_pass(other)
        if (counts := counted_work(other, launched.world_size)) is not None:
            passes, longest = counts.passes_per_rank, counts.longest_pass
        cast = launched.casts_weights(other)
        what = (longest, other.tune, other.training_arguments.get("gradient_checkpointing"), cast)
        if what not in traced:
            traced[what] = _trace(other, config, labels, facts.layers, longest, on_cpu=on_cpu, cast=cast)
        return plan_memory(other, launched, counted, traced[what], passes, on_cpu=on_cpu)

    planned = memory(recipe, launch)
    limit = limit if limit is not None else device.memory_bytes if device else None
    share = USUAL_SHARE
    if measured is not None and device is not None and work is not None:
        share = measured_share(measured, recipe, facts, work, device)
    time = step_time(recipe, facts, launch, work, device, share, per_node) if work and device else None
    once = checkpoint_bytes(recipe, facts, STATE_BYTES.get(recipe.training_arguments["optim"], 8))
    rows = []
    for other in _launches(recipe, launch, compare, world_sizes):
        counts = counted_work(recipe, other.world_size)
        seconds = step_time(recipe, facts, other, counts, device, share, per_node) if counts and device else None
        rows.append(Row(other, memory(recipe, other), seconds))
    does_not_fit = limit is not None and planned.total > limit
    return RunPlan(
        asked=asked,
        model=facts,
        memory=planned,
        work=work,
        why_no_work=why,
        device=device,
        share=share,
        share_is_measured=measured is not None,
        time=time,
        limit=limit,
        remedies=tuple(find_remedies(recipe, launch, limit, memory)) if does_not_fit and limit else (),
        checkpoint_bytes=once,
        disk_bytes=once * most_checkpoints_at_once(recipe, work.checkpoints if work else 3),
        rows=tuple(rows),
    )


def _data(recipe: RunRecipe, show_progress: bool) -> tuple[Any, str | None]:
    """The prepared data, or why there are none."""
    try:
        if project := project_of(recipe.keys()):
            return project.prepare(recipe, load_tokenizer(recipe, needed=("pad",))), None
        assert isinstance(recipe, Recipe | ClassificationRecipe)
        needed = ("pad",) if isinstance(recipe, ClassificationRecipe) else ("eos", "pad")
        return prepare_run_data(recipe, load_tokenizer(recipe, needed), show=show_progress), None
    except UserError as reason:
        return None, str(reason)


def _fullest_pass(recipe: RunRecipe) -> tuple[tuple[int, ...], int]:
    """A pass of whole documents up to `microbatch_tokens`, where no data say how long they are."""
    count = max(1, recipe.microbatch_tokens // recipe.max_seq_length)
    lengths = (recipe.max_seq_length,) * count
    return lengths, count if isinstance(recipe, ClassificationRecipe) else sum(lengths)


def _trace(
    recipe: RunRecipe,
    config: Any,
    labels: int | None,
    layers: int,
    longest: tuple[tuple[int, ...], int],
    *,
    on_cpu: bool,
    cast: bool,
) -> PassMemory:
    """The memory of a pass; `cast` where the engine turns all weights into the 16 bits in which others autocast."""
    compute = compute_dtype(recipe)
    build = builder(recipe, config, labels)
    return trace_pass(
        (lambda blocks: build(blocks).to(compute)) if cast else build,
        layers,
        *longest,
        is_classifier=isinstance(recipe, ClassificationRecipe),
        autocast=None if cast or compute == torch.float32 else compute,
        on_cpu=on_cpu,
        checkpointing=bool(recipe.training_arguments.get("gradient_checkpointing")),
    )


def _launches(recipe: RunRecipe, launch: Launch, engines: Sequence[str], world_sizes: Sequence[int]) -> list[Launch]:
    if not engines and not world_sizes:
        return []
    for name in engines:
        if name not in ENGINES:
            raise UserError(f"--compare {name} is no engine: choose among {', '.join(ENGINES)}")
    sizes = list(world_sizes) or [launch.world_size]
    if min(sizes) < 1:
        raise UserError(f"--world_sizes has {min(sizes)}: a launch has at least one process")
    named = list(engines) or [None]
    return [_launch(name, size, recipe, launch) for name in named for size in sizes]


def _launch(name: str | None, size: int, recipe: RunRecipe, launch: Launch) -> Launch:
    if name is None:
        engine = {PLAIN: DDP, DDP: DDP}.get(launch.engine, launch.engine)
        return replace(launch, world_size=size, engine=PLAIN if engine == DDP and size == 1 else engine)
    if name in ("plain", "ddp"):
        return read_launch(None, size, recipe, lambda _: None)
    if name == "fsdp2":
        return Launch(FSDP, size, "accelerate_configs/fsdp2.yaml")
    stage = int(name.removeprefix("zero")[0])
    config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000}}
    offload = ("optimizer", "param") if name.endswith("_offload") else ()
    return Launch(DEEPSPEED, size, f"accelerate_configs/{name}.yaml", config, offload)
