"""The work of a run: counted from the prepared data and the very plan that training carries out."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from isotune.config import Recipe, RunRecipe
from isotune.data.batch_schedule import StepSchedule, assign_to_ranks
from isotune.preflight.resources.model_stats import ModelStats

_MOST_STEPS_LOOKED_AT = 200


@dataclass(frozen=True)
class Work:
    """Counts of a run; those of a step are of the first, or means over the steps of an epoch (at most 200).

    Attributes:
        packing_efficiency: tokens over the room of all rows; None where rows are documents.
        longest_pass: tokens of each document of the costliest pass, and its targets.
        attention_squares_per_step: sum over documents of tokens squared.
        imbalance: the mean over steps of the costliest rank's work over the mean rank's, less one.
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
    passes_per_step: int
    passes_per_rank: int
    imbalance: float
    evaluations: int
    checkpoints: int
    longest_pass: tuple[tuple[int, ...], int]


def count_work(recipe: RunRecipe, data: Any, world_size: int) -> Work:
    """What training would do with prepared `data` (`isotune.data.run_data.RunData`) on that many processes."""
    documents, rows = data.train.documents, data.train.rows
    plan = StepSchedule(
        documents,
        rows,
        global_batch_size=recipe.global_batch_size,
        microbatch_tokens=recipe.microbatch_tokens,
        seed=recipe.seed,
    )
    epoch = plan.steps_per_epoch
    steps = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * epoch)
    looked_at = [plan.step(number) for number in range(min(epoch, steps, _MOST_STEPS_LOOKED_AT))]
    lengths = documents.lengths
    costliest = max((m for step in looked_at for m in step.microbatches), key=lambda m: (m.tokens, m.cost))
    balance = []
    for step in looked_at:
        costs = [sum(m.cost * m.weight for m in share) for share in assign_to_ranks(step, world_size)]
        balance.append(max(costs) / (sum(costs) / world_size) - 1)
    tokens = int(lengths.sum())
    room = len(rows) * recipe.max_seq_length
    return Work(
        documents=len(documents),
        rows=len(rows),
        tokens=tokens,
        packing_efficiency=tokens / room if isinstance(recipe, Recipe) else None,
        steps_per_epoch=epoch,
        steps=steps,
        epochs=steps / epoch,
        tokens_per_step=float(np.mean([step.input_tokens for step in looked_at])),
        targets_per_step=float(np.mean([step.supervised_tokens for step in looked_at])),
        attention_squares_per_step=float(
            np.mean([sum(float(lengths[d]) ** 2 for m in s.microbatches for d in m.documents) for s in looked_at])
        ),
        passes_per_step=max(len(step.microbatches) for step in looked_at),
        passes_per_rank=max(math.ceil(len(step.microbatches) / world_size) for step in looked_at),
        imbalance=float(np.mean(balance)),
        evaluations=_times(recipe, "eval", steps, epoch) if data.evaluation is not None else 0,
        checkpoints=_times(recipe, "save", steps, epoch),
        longest_pass=(tuple(int(lengths[d]) for d in costliest.documents), costliest.supervised_tokens),
    )


def checkpoint_bytes(recipe: RunRecipe, model: ModelStats, state_bytes: float) -> int:
    """One checkpoint: trained parameters in fp32 and the optimizer's state."""
    return round(model.trained * (4 + state_bytes))


def most_checkpoints_at_once(recipe: RunRecipe, checkpoints: int) -> int:
    """Kept under `save_total_limit`, and the one that is being written beside them."""
    return min(checkpoints, int(recipe.training_arguments["save_total_limit"]) + 1)


def _times(recipe: RunRecipe, what: str, steps: int, epoch: int) -> int:
    """How often a run of that many steps evaluates or saves; the last step saves in any case."""
    strategy = recipe.training_arguments.get(f"{what}_strategy", "no")
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return math.ceil(steps / epoch)
    every: float = recipe.training_arguments[f"{what}_steps"]
    every = math.ceil(every * steps) if every < 1 else int(every)
    times = steps // every
    return times + 1 if what == "save" and steps % every else times
