"""The work of a run, counted from the prepared data and the schedule that training follows.

FLOPs are counted as they are computed: attention within documents, half of it where it is causal, the head at
supervised positions only, and a second forward with gradient checkpointing. `--measured RUN` takes the share of the
device's peak that a run reaches, the model FLOPs utilization (MFU), from a finished run.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config import Recipe, RunRecipe
from isotune.config.effects import count_events
from isotune.data.batch_schedule import StepSchedule, assign_to_ranks
from isotune.io.errors import UserError
from isotune.io.reading import Unreadable
from isotune.io.run_files import read_environment
from isotune.preflight.resources.devices import Device
from isotune.preflight.resources.sharding import ModelStats
from isotune.run.metrics_file import METRICS, read_metrics

_MAX_COUNTED_STEPS = 200


@dataclass(frozen=True)
class Work:
    """Counts of a run; `_per_step` are means or maxima over the steps of the first epoch (at most 200)."""

    documents: int
    rows: int
    tokens: int
    packing_efficiency: float | None  # tokens over the capacity of all rows; None where a row is a document
    steps_per_epoch: int
    steps: int
    epochs: float
    tokens_per_step: float
    targets_per_step: float
    attention_squares_per_step: float  # sum over documents of squared tokens
    microbatches_per_step: int
    microbatches_per_rank: int
    imbalance: float  # mean over steps of the maximum over the mean cost of the ranks, minus 1
    evaluations: int
    checkpoints: int
    costliest_microbatch: tuple[tuple[int, ...], int]  # tokens of each of its documents, and its number of targets


def count_work(recipe: RunRecipe, data: Any, world_size: int, *, exact: bool, padded: bool = False) -> Work:
    """Count what training does with prepared `data` (`isotune.data.documents.RunData`) on that many processes.

    `exact`: it sums gradients as integers, so its microbatches do not depend on the processes. `padded`: the
    model fills the documents of a microbatch up to the longest.
    """
    documents, rows = data.train.documents, data.train.rows
    schedule = StepSchedule(
        documents,
        rows,
        global_batch_size=recipe.global_batch_size,
        microbatch_tokens=recipe.forward_tokens("microbatch_tokens"),
        ranks=None if exact else world_size,
        padded=padded,
        seed=recipe.seed,
    )
    epoch = schedule.steps_per_epoch
    steps = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * epoch)
    counted = [schedule.step(number) for number in range(min(epoch, steps, _MAX_COUNTED_STEPS))]
    lengths = documents.lengths
    costliest = max((m for step in counted for m in step.microbatches), key=schedule.memory_order)
    imbalances, squares, per_rank = [], [], 0
    for step in counted:
        shares = assign_to_ranks(step, world_size)
        costs = [sum(m.cost * m.weight for m in share) for share in shares]
        per_rank = max(per_rank, len(shares[0]))
        imbalances.append(max(costs) / (sum(costs) / world_size) - 1)
        squares.append(sum(float(lengths[d]) ** 2 for m in step.microbatches for d in m.documents))
    tokens, capacity = int(lengths.sum()) // rows.epochs, len(rows) * recipe.max_seq_length
    return Work(
        documents=len(documents) // rows.epochs,
        rows=len(rows),
        tokens=tokens,
        packing_efficiency=tokens / capacity if isinstance(recipe, Recipe) else None,
        steps_per_epoch=epoch,
        steps=steps,
        epochs=steps / epoch,
        tokens_per_step=float(np.mean([step.input_tokens for step in counted])),
        targets_per_step=float(np.mean([step.supervised_tokens for step in counted])),
        attention_squares_per_step=float(np.mean(squares)),
        microbatches_per_step=max(len(step.microbatches) for step in counted),
        microbatches_per_rank=per_rank,
        imbalance=float(np.mean(imbalances)),
        evaluations=count_events(recipe, "eval", steps, epoch) if data.evaluation is not None else 0,
        checkpoints=count_events(recipe, "save", steps, epoch),
        costliest_microbatch=(tuple(int(lengths[d]) for d in costliest.documents), costliest.supervised_tokens),
    )


def flops_per_step(recipe: RunRecipe, model: ModelStats, work: Work) -> float:
    """FLOPs of the matrix products of a step, over all processes."""
    return sum(count_flops(recipe, model, work.tokens_per_step, work.targets_per_step, work.attention_squares_per_step))


def count_flops(
    recipe: RunRecipe, model: ModelStats, tokens: float, targets: float, attention_squares: float
) -> tuple[float, float]:
    """FLOPs of the linear layers and of attention for so many tokens, targets and squared tokens of documents."""
    # 2 for forward, 2 for the gradient of the input, 2 for the gradient of a trained weight
    times = 6 if recipe.tune == "full" else 4
    again = 2 if recipe.training_arguments.get("gradient_checkpointing") else 0
    linear = (times + again) * model.linear_numel * tokens
    head = times * model.head_numel * targets
    adapters = (6 + again) * model.adapter_numel * tokens
    products = 2 if isinstance(recipe, Recipe) else 4  # causal attention needs half of them
    square = products * attention_squares * model.attention_size * model.layers
    return linear + head + adapters, square * (3 + again / 2)


def measured_mfu(run: Path, recipe: RunRecipe, model: ModelStats, work: Work, device: Device) -> float:
    """The MFU of a finished run of this recipe: the median over its steps, on one process; UserError without steps."""
    try:
        steps = read_metrics(run / METRICS).steps
        processes = read_environment(run)["in_effect"]["world_size"]
    except (FileNotFoundError, Unreadable, KeyError) as error:
        raise UserError(f"--measured {run}: no metrics.jsonl and environment.json of a run: {error}") from None
    rates = [rate for rate in steps.column("tokens_per_second").tolist() if rate > 0]
    if not rates:
        raise UserError(f"--measured {run}: metrics.jsonl has no step")
    flops_per_token = flops_per_step(recipe, model, work) / work.tokens_per_step
    return statistics.median(rates) / processes * flops_per_token / device.peak_flops(recipe)
