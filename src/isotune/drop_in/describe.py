"""What is guaranteed of a trainer's result, and what its own code takes away."""

from typing import Any

import transformers
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer

from isotune.training.trainer import PlannedTraining

LIBRARY_PREDICTIONS = (transformers.Trainer.prediction_step, TrlSFTTrainer.prediction_step)


def describe(trainer: Any) -> str:
    """What is guaranteed of a trainer's result, a line each, to be printed."""
    plan = trainer.plan
    launch = f"{trainer.args.world_size} process{'es' if trainer.args.world_size > 1 else ''}"
    bits = "bit for bit" if plan.exact_gradients else "to rounding"
    losses = f"the sum over the update's {plan.task.target.replace('_', ' ')}, divided once by their number"
    if trainer.own_loss is not None:
        way = "a sum over rows" if trainer.own_loss.adds_up else "once of all its logits, by a second forward pass"
        losses = f"your own compute_loss over the global batch, {way}"
    packed = "no document sees another"
    lines = [
        f"an update   {plan.schedule.global_batch_size} rows, on this launch of {launch} and on any other",
        f"losses      {losses}",
        f"gradients   the same on any number of processes, {bits}",
        "dropout     of the document: not of its neighbours, its microbatch or its rank",
        f"attention   {plan.task.attention}: {packed}",
        *(f"not exact   {line}" for line in not_exact(trainer)),
    ]
    return "\n".join(lines)


def not_exact(trainer: Any) -> list[str]:
    """What is honoured, and is not the same on every launch."""
    args, found = trainer.args, list[str]()
    own_step = type(trainer).training_step is not PlannedTraining.training_step
    if own_step:
        found.append("training_step is your own: nothing is known of its updates")
    if type(trainer).prediction_step not in LIBRARY_PREDICTIONS:
        found.append("prediction_step is your own, and is not called: predict() has one prediction a row")
    if args.train_sampling_strategy not in ("random", "sequential"):
        found.append(f"train_sampling_strategy: {args.train_sampling_strategy}: rows are shuffled; none is padded")
    if getattr(args, "torch_compile", False):
        found.append("torch_compile: kernels are chosen by shapes, which differ between launches")
    return found
