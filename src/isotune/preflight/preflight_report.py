"""The preflight report of a run: its recipe and launch, the work, the memory and the time, and what would fit."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.config.effects import settings_without_effect
from isotune.config.recipes import project_of
from isotune.data.classification.split import prepare_labelled
from isotune.data.sft.preparation import prepare_conversations
from isotune.io import shipped
from isotune.io.errors import UserError, first_line
from isotune.models.base import vocabulary
from isotune.models.opening import compute_dtype, load_config, load_tokenizer, within_positions
from isotune.preflight.microbatch_size import choose_microbatch_tokens
from isotune.preflight.request import DDP, FSDP, PLAIN, SHIPPED, Launch, PreflightRequest, shipped_launch
from isotune.preflight.resources.activation_memory import TRACED_BLOCKS, MicrobatchMemory, trace_microbatch
from isotune.preflight.resources.blocks import with_layers
from isotune.preflight.resources.compute import Work, count_work, measured_mfu
from isotune.preflight.resources.devices import Device
from isotune.preflight.resources.memory import Memory, estimate_memory, state_bytes
from isotune.preflight.resources.sharding import ModelStats, Sharding, model_builder, model_stats
from isotune.preflight.resources.step_time import StepTime, predict_step, step_load

IMBALANCE_TO_MENTION = 0.03


@dataclass(frozen=True)
class ComparedLaunch:
    """One row of a comparison of launches; `time` is None without a device."""

    launch: Launch
    memory: Memory
    time: StepTime | None


@dataclass(frozen=True)
class Suggestion:
    """A change as flags, the bytes that a process then needs, and whether the result stays the same to rounding."""

    change: str
    total: int
    same_result: bool


@dataclass(frozen=True)
class LessWaiting:
    """A size of the microbatch with which the processes of an exact run wait less for each other."""

    microbatch_tokens: int
    imbalance: float


@dataclass(frozen=True)
class PreflightReport:
    """Everything that is known about a run before it starts."""

    request: PreflightRequest
    model: ModelStats
    memory: Memory
    work: Work | None
    no_work_reason: str | None  # why the data could not be counted
    device: Device | None
    time: StepTime | None
    limit: int | None  # bytes of memory of a process, where it is known
    suggestions: tuple[Suggestion, ...]
    chosen_tokens: int | None  # of a microbatch, where the recipe says auto
    less_waiting: LessWaiting | None  # where processes wait for each other and another size would change that
    checkpoint_bytes: int
    without_effect: tuple[str, ...]  # settings that cannot have theirs in a run of this length: a sentence each
    disk_bytes: int  # of all checkpoints that exist at once, the one being written included
    rows: tuple[ComparedLaunch, ...]  # the comparison of launches, if one was requested

    @property
    def fits(self) -> bool | None:
        """Whether a process has enough memory; None where the limit is unknown."""
        return None if self.limit is None else self.memory.total <= self.limit

    @property
    def hours(self) -> float | None:
        """Expected hours of all steps."""
        return self.work.steps * self.time.expected / 3600 if self.work and self.time else None


def run_preflight(
    request: PreflightRequest,
    *,
    limit: int | None = None,
    device: Device | None = None,
    measured: Path | None = None,
    processes_per_node: int = 8,
    compare: Sequence[str] = (),
    world_sizes: Sequence[int] = (),
    show_progress: bool = True,
    prepared: Any = None,
    new_rows: Sequence[int] = (),
) -> PreflightReport:
    """Estimate a run whose recipe names at least a model and data, which may be `prepared` already, with the `new_rows`
    of the embedding.

    `limit`, bytes of memory of a process, is by default the device's, which is needed for times; the MFU is taken from
    `measured`, a finished run; the engines `compare` and the numbers of processes `world_sizes` are compared. Raises
    UserError for an unknown model, engine or number of processes.
    """
    recipe, launch = request.recipe, request.launch
    compared = _compared_launches(launch, compare, world_sizes)  # refused before the work
    config = load_config(recipe)
    recipe = within_positions(recipe, config)
    request = replace(request, recipe=recipe)
    data, no_work_reason = prepared, None
    if prepared is None:
        data, new_rows, no_work_reason = _prepare_data(recipe, config, show_progress)
    estimator = Estimator(recipe, config, data, on_cpu=device is None and limit is None, new_rows=new_rows)
    if limit is None and device is not None:
        limit = device.memory_bytes
    chosen = None
    if recipe.microbatch_tokens == "auto":
        chosen, _ = choose_microbatch_tokens(recipe, launch, limit, estimator.memory)
        recipe = recipe.with_values(microbatch_tokens=chosen)
        request = replace(request, recipe=recipe)
    stats, work, memory = estimator.stats, estimator.work(recipe, launch), estimator.memory(recipe, launch)
    mfu = None
    if measured is not None and device is not None and work is not None:
        mfu = measured_mfu(measured, recipe, stats, work, device)

    def time(other: Launch) -> StepTime | None:
        counts = estimator.work(recipe, other)
        if counts is None or device is None:
            return None
        sharding, traffic = Sharding(recipe, stats, other), estimator.trace(recipe, other).traffic
        load = step_load(sharding, counts, traffic)
        found = predict_step(sharding, counts.microbatches_per_rank, load, device, processes_per_node)
        return found if mfu is None else replace(found, measured=found.floor / mfu)

    suggestions = ()
    if limit is not None and memory.total > limit:
        suggestions = tuple(_find_suggestions(recipe, launch, limit, estimator.memory))
    # the trained parameters in fp32 and the optimizer's state; one more than are kept exists while it is written
    checkpoint_bytes = round(stats.trained_numel * (4 + state_bytes(recipe)))
    kept = int(recipe.training_arguments["save_total_limit"])
    return PreflightReport(
        request=request,
        model=stats,
        memory=memory,
        work=work,
        no_work_reason=no_work_reason,
        device=device,
        time=time(launch),
        limit=limit,
        suggestions=suggestions,
        chosen_tokens=chosen,
        less_waiting=_find_less_waiting(recipe, launch, work, estimator.work),
        checkpoint_bytes=checkpoint_bytes,
        without_effect=tuple(
            settings_without_effect(recipe, work.steps, work.steps_per_epoch, work.rows) if work else ()
        ),
        disk_bytes=checkpoint_bytes * min(work.checkpoints if work else 3, kept + 1),
        rows=tuple(ComparedLaunch(other, estimator.memory(recipe, other), time(other)) for other in compared),
    )


class NotTraced(UserError):
    """A model whose activations are not known before it trains."""


class Estimator:
    """Work and memory of a recipe, its variants and launches; what several of them share is computed once."""

    def __init__(
        self, recipe: RunRecipe, config: Any, data: Any, *, on_cpu: bool, new_rows: Sequence[int] = ()
    ) -> None:
        self.recipe, self.config, self.data, self.on_cpu = recipe, config, data, on_cpu
        self.new_rows = new_rows  # of the embedding
        self.num_labels = getattr(getattr(data, "train", None), "num_labels", None)
        self.stats = model_stats(recipe, config, self.num_labels, new_rows)
        self._works: dict[tuple[int, int, bool], Work] = {}
        self._traces: dict[tuple, MicrobatchMemory] = {}

    def work(self, recipe: RunRecipe, launch: Launch) -> Work | None:
        """The work of a variant under a launch, which may differ in its microbatches; None without data."""
        exact = Sharding(recipe, self.stats, launch).exact_gradients
        key = recipe.forward_tokens("microbatch_tokens"), launch.world_size, exact
        if self.data is not None and key not in self._works:
            self._works[key] = count_work(recipe, self.data, launch.world_size, exact=exact, padded=self.stats.pads)
        return self._works.get(key)

    def memory(self, recipe: RunRecipe, launch: Launch) -> Memory:
        """The memory of a variant under a launch."""
        stats = (
            self.stats if recipe is self.recipe else model_stats(recipe, self.config, self.num_labels, self.new_rows)
        )
        work = self.work(recipe, launch)
        count = 2 if work is None else work.microbatches_per_rank
        return estimate_memory(Sharding(recipe, stats, launch), self.trace(recipe, launch), count, on_cpu=self.on_cpu)

    def trace(self, recipe: RunRecipe, launch: Launch) -> MicrobatchMemory:
        """The costliest microbatch of a variant under a launch, traced; NotTraced where the model needs values."""
        work = self.work(recipe, launch)
        if work is not None:
            microbatch = work.costliest_microbatch
        else:  # a full microbatch of the longest documents
            rows = recipe.forward_tokens("microbatch_tokens") // recipe.max_seq_length
            lengths = (recipe.max_seq_length,) * max(1, rows)
            microbatch = (lengths, len(lengths) if isinstance(recipe, ClassificationRecipe) else sum(lengths))
        dtype, casts_weights = compute_dtype(recipe), launch.casts_weights(recipe)
        checkpointing = bool(recipe.training_arguments.get("gradient_checkpointing"))
        key = (microbatch, recipe.tune, checkpointing, casts_weights)
        if key not in self._traces:
            build = model_builder(recipe, self.config, self.num_labels, self.new_rows)
            try:
                self._traces[key] = trace_microbatch(
                    (lambda layers: build(layers).to(dtype)) if casts_weights else build,  # instead of autocast
                    None if with_layers(self.config, TRACED_BLOCKS[0]) is None else self.stats.layers,
                    *microbatch,
                    is_classifier=isinstance(recipe, ClassificationRecipe),
                    autocast=None if casts_weights or dtype == torch.float32 else dtype,
                    on_cpu=self.on_cpu,
                    checkpointing=checkpointing,
                )
            except UserError:
                raise
            except Exception as error:  # of whatever a model does with tensors that have no values
                kind = self.config.model_type
                raise NotTraced(
                    f"the activations of model type '{kind}' cannot be estimated ({first_line(error)})"
                ) from error
        return self._traces[key]


def _find_less_waiting(
    recipe: RunRecipe, launch: Launch, work: Work | None, count: Callable[[RunRecipe, Launch], Work | None]
) -> LessWaiting | None:
    """The largest microbatch with which processes hardly wait, or that with which they wait least.

    With exact_gradients microbatches do not depend on the processes, so their number may not divide by them.
    """
    if work is None or work.imbalance <= IMBALANCE_TO_MENTION:
        return None
    most, smallest = recipe.forward_tokens("microbatch_tokens"), recipe.max_seq_length
    # n microbatches on each process, with room for unequal rows and steps
    a_rank = [math.ceil(work.tokens_per_step / (launch.world_size * n - 0.5)) for n in range(1, 9)]
    found = []
    for size in sorted({size for size in (*a_rank, smallest) if smallest <= size < most}, reverse=True):
        other = count(recipe.with_values(microbatch_tokens=size), launch)
        assert other is not None, "the work of this recipe was counted"
        found.append(LessWaiting(size, other.imbalance))
        if other.imbalance <= IMBALANCE_TO_MENTION:
            return found[-1]
    least = min(found, key=lambda one: one.imbalance, default=None)
    return least if least and least.imbalance < work.imbalance / 2 else None


def _find_suggestions(
    recipe: RunRecipe, launch: Launch, limit: int, estimate: Callable[[RunRecipe, Launch], Memory]
) -> list[Suggestion]:
    """Changes with which a process needs at most `limit` bytes by `estimate`; those that keep the result come first."""
    suggestions = []
    for other, values in _changes(recipe, launch):
        try:
            changed = recipe.with_values(**values) if values else recipe
        except UserError:  # the values contradict another key
            continue
        total = estimate(changed, other).total
        if total <= limit:
            flags = [f"--{key} {'true' if value is True else value}" for key, value in values.items()]
            file = [] if other is launch else [shipped.engine(Path(other.name).stem)]
            suggestions.append(Suggestion(" ".join([*file, *flags]), total, same_result="tune" not in values))
    return sorted(suggestions, key=lambda suggestion: (not suggestion.same_result, -suggestion.total))


def _changes(recipe: RunRecipe, launch: Launch) -> Iterator[tuple[Launch, dict[str, Any]]]:
    """A launch and values of the recipe for each change; all but those of `tune` keep the result."""
    smallest, tokens = recipe.max_seq_length, recipe.forward_tokens("microbatch_tokens")
    sizes = [size for size in (tokens // 2, tokens // 4) if size >= smallest]
    if tokens // 2 < smallest < tokens:
        sizes.append(smallest)
    yield from ((launch, {"microbatch_tokens": size}) for size in sizes)
    if not recipe.training_arguments.get("gradient_checkpointing"):
        yield launch, {"gradient_checkpointing": True}
        if tokens > smallest:
            yield launch, {"gradient_checkpointing": True, "microbatch_tokens": smallest}
    if launch.world_size > 1 and launch.engine != FSDP:
        for name in ("zero1", "zero2", "zero3", "zero3_offload"):
            sharded = shipped_launch(name, launch.world_size)
            if sharded.offload or (launch.zero_stage or 0) < (sharded.zero_stage or 0):
                yield sharded, {}
                if sharded.zero_stage == 3:
                    yield sharded, {"gradient_checkpointing": True}
    if recipe.tune == "full":
        yield launch, {"tune": "lora"}
    if recipe.tune != "qlora":
        yield launch, {"tune": "qlora"}
        yield launch, {"tune": "qlora", "gradient_checkpointing": True}


def _prepare_data(recipe: RunRecipe, config: Any, show_progress: bool) -> tuple[Any, Sequence[int], str | None]:
    """The prepared data, the embedding's new rows, and the reason where there are no data.

    UserError where the tokenizer does not fit the model, or new rows need one that cannot be read.
    """
    try:
        tokenizer = load_tokenizer(recipe)
    except UserError as error:
        if recipe.add_tokens or recipe.resize_embeddings:
            raise
        return None, (), str(error)
    new_rows = vocabulary.new_rows(config, tokenizer, recipe)
    try:
        if project := project_of(recipe.keys()):
            return project.prepare(recipe, tokenizer), new_rows, None
        if isinstance(recipe, ClassificationRecipe):
            return prepare_labelled(recipe, tokenizer, show=show_progress), new_rows, None
        assert isinstance(recipe, Recipe)
        return prepare_conversations(recipe, tokenizer, show=show_progress), new_rows, None
    except UserError as error:
        return None, new_rows, str(error)


def _compared_launches(launch: Launch, engines: Sequence[str], world_sizes: Sequence[int]) -> list[Launch]:
    if not engines and not world_sizes:
        return []
    for name in engines:
        if name not in SHIPPED:
            raise UserError(f"--compare {name} is not an engine: choose among {', '.join(SHIPPED)}")
    sizes = list(world_sizes) or [launch.world_size]
    if min(sizes) < 1:
        raise UserError(f"--world_sizes has {min(sizes)}: a launch has at least one process")
    if engines:
        return [shipped_launch(name, size) for name in engines for size in sizes]
    if launch.engine in (PLAIN, DDP):
        return [replace(launch, world_size=size, engine=PLAIN if size == 1 else DDP) for size in sizes]
    return [replace(launch, world_size=size) for size in sizes]
