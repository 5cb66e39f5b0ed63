"""The work of a run, counted from the prepared data and the step schedule that training follows."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from isotune.config import Recipe, RunRecipe
from isotune.data.batch_schedule import StepSchedule, assign_to_ranks
from isotune.preflight.resources.model_stats import ModelStats

_MAX_COUNTED_STEPS = 200


@dataclass(frozen=True)
class Work:
    """Counts of a run; `_per_step` are means or maxima over the steps of the first epoch (at most 200).

    Attributes:
        packing_efficiency: tokens over the capacity of all rows; None where a row is a document.
        attention_squares_per_step: sum over documents of squared tokens.
        imbalance: mean over steps of the maximum over the mean cost of the ranks, minus 1.
        costliest_microbatch: tokens of each of its documents, and its number of targets.
    """

    documents: int
    rows: int
    tokens: int
    packing_efficiency: float | None
    steps_per_epoch: int
    steps: int
    epochs: float
    tokens_per_step: float
    targets_per_step: float
    attention_squares_per_step: float
    microbatches_per_step: int
    microbatches_per_rank: int
    imbalance: float
    evaluations: int
    checkpoints: int
    costliest_microbatch: tuple[tuple[int, ...], int]


def count_work(recipe: RunRecipe, data: Any, world_size: int) -> Work:
    """Count what training does with prepared `data` (`isotune.data.documents.RunData`) on that many processes."""
    documents, rows = data.train.documents, data.train.rows
    schedule = StepSchedule(
        documents,
        rows,
        global_batch_size=recipe.global_batch_size,
        microbatch_tokens=recipe.microbatch_tokens,
        seed=recipe.seed,
    )
    epoch = schedule.steps_per_epoch
    steps = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * epoch)
    counted = [schedule.step(number) for number in range(min(epoch, steps, _MAX_COUNTED_STEPS))]
    lengths = documents.lengths
    costliest = max((m for step in counted for m in step.microbatches), key=lambda m: (m.tokens, m.cost))
    imbalances = []
    for step in counted:
        costs = [sum(m.cost * m.weight for m in share) for share in assign_to_ranks(step, world_size)]
        imbalances.append(max(costs) / (sum(costs) / world_size) - 1)
    tokens = int(lengths.sum())
    capacity = len(rows) * recipe.max_seq_length
    return Work(
        documents=len(documents),
        rows=len(rows),
        tokens=tokens,
        packing_efficiency=tokens / capacity if isinstance(recipe, Recipe) else None,
        steps_per_epoch=epoch,
        steps=steps,
        epochs=steps / epoch,
        tokens_per_step=float(np.mean([step.input_tokens for step in counted])),
        targets_per_step=float(np.mean([step.supervised_tokens for step in counted])),
        attention_squares_per_step=float(
            np.mean([sum(float(lengths[d]) ** 2 for m in s.microbatches for d in m.documents) for s in counted])
        ),
        microbatches_per_step=max(len(step.microbatches) for step in counted),
        microbatches_per_rank=max(math.ceil(len(step.microbatches) / world_size) for step in counted),
        imbalance=float(np.mean(imbalances)),
        evaluations=_times(recipe, "eval", steps, epoch) if data.evaluation is not None else 0,
        checkpoints=_times(recipe, "save", steps, epoch),
        costliest_microbatch=(tuple(int(lengths[d]) for d in costliest.documents), costliest.supervised_tokens),
    )


def checkpoint_bytes(model: ModelStats, state_bytes: float) -> int:
    """Bytes of a checkpoint: trained parameters in fp32, and `state_bytes` of optimizer state for each."""
    return round(model.trained_numel * (4 + state_bytes))


def max_checkpoints_at_once(recipe: RunRecipe, checkpoints: int) -> int:
    """Checkpoints that `save_total_limit` keeps, and the one that is being written."""
    return min(checkpoints, int(recipe.training_arguments["save_total_limit"]) + 1)


def _times(recipe: RunRecipe, what: str, steps: int, epoch: int) -> int:
    """How often a run evaluates (`eval`) or saves (`save`); it always saves at the last step."""
    strategy = recipe.training_arguments.get(f"{what}_strategy", "no")
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return math.ceil(steps / epoch)
    every: float = recipe.training_arguments[f"{what}_steps"]
    every = math.ceil(every * steps) if every < 1 else int(every)
    times = steps // every
    return times + 1 if what == "save" and steps % every else times
