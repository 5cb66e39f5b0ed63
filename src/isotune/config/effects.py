"""Settings of a run that cannot have the effect that they are there for, once its number of steps is known.

A key that has no effect beside the other keys is refused when the recipe is read (`Requirement`). What is here depends
on how long the run is, and so on the data: the run and `isotune plan` say it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

from isotune.config.engine_keys import evaluates
from isotune.config.run_recipe import RunRecipe
from isotune.io.errors import UserError

FEW_STEPS = 2  # after the warm-up, which show no schedule
_SAMPLED_STEPS = 2_000  # of a schedule, evenly spaced, beside its corners


def settings_without_effect(recipe: RunRecipe, steps: int, steps_per_epoch: int, rows: int | None = None) -> list[str]:
    """A sentence for each setting that a run of that many steps, over `rows` rows, leaves without its effect.

    UserError for one with which transformers' schedule would fail at the end of the run.
    """
    few = rows is not None and rows < recipe.global_batch_size
    return [
        *([f"global_batch_size is {recipe.global_batch_size:,}, and a step sees all {rows:,} rows"] if few else ()),
        *_of_the_rate(recipe, steps),
        *_of_evaluations(recipe, steps, steps_per_epoch),
        *_of_reports(recipe, steps),
    ]


def count_events(recipe: RunRecipe, what: str, steps: int, steps_per_epoch: int) -> int:
    """How often a run evaluates (`eval`) or writes a checkpoint (`save`); each also happens at the last step."""
    arguments = recipe.training_arguments
    strategy, delay = arguments.get(f"{what}_strategy", "no"), arguments.get("eval_delay", 0) if what == "eval" else 0
    if strategy == "no" or (what == "eval" and not evaluates(recipe.values)):
        return 0
    if strategy == "epoch":
        ends = [min(epoch * steps_per_epoch, steps) for epoch in range(1, math.ceil(steps / steps_per_epoch) + 1)]
        times = sum(end / steps_per_epoch >= delay for end in ends)
    else:
        every = step_count(arguments[f"{what}_steps"], steps)
        times = sum(step >= delay for step in {*range(every, steps + 1, every), steps})
    return times + bool(what == "eval" and arguments.get("eval_on_start"))


def step_count(value: float, steps: int) -> int:
    """A number of steps, which below 1 is a share of the run."""
    return math.ceil(value * steps) if value < 1 else int(value)


def _of_the_rate(recipe: RunRecipe, steps: int) -> Iterator[str]:
    rate: float = recipe.training_arguments["learning_rate"]
    name: str = recipe.training_arguments["lr_scheduler_type"]
    if not rate:
        yield "learning_rate is 0: no weight changes"
        return
    warmup = step_count(recipe.training_arguments["warmup_steps"], steps)
    if name == "polynomial" and warmup == steps:
        raise UserError(
            f"warmup_steps is {warmup:,}, all steps of the run, and lr_scheduler_type polynomial divides by the number "
            "of the others: lower warmup_steps"
        )
    factor = _rate_factor(recipe, steps, warmup)
    corners = {0, steps - 1, *(step for step in (warmup - 1, warmup, warmup + 1) if 0 <= step < steps)}
    sampled = sorted(corners | set(range(0, steps, math.ceil(steps / _SAMPLED_STEPS))))
    peak = max(map(factor, sampled))
    if warmup and peak < 1 - 1e-9:
        yield (
            f"warmup_steps is {warmup:,} and the run has {steps:,} steps: the learning rate comes to {peak * rate:.3g} "
            f"at most and never reaches learning_rate {rate:g}"
        )
    options: dict[str, Any] = recipe.training_arguments.get("lr_scheduler_kwargs") or {}
    of_warmup = next((key for key in ("warmup_lr_rate", "warmup_type") if key in options), None)
    if of_warmup is not None and not warmup:
        yield f"lr_scheduler_kwargs has {of_warmup}, and without warmup_steps there is no warm-up"
    decay = int(options.get("num_decay_steps", 0))
    before = warmup + int(options.get("num_stable_steps", max(0, steps - warmup - decay)))
    after_warmup = {round(factor(step), 9) for step in sampled if step >= warmup}
    if decay and before + decay > steps:
        end = f"begins after {before:,} steps" if before >= steps else f"ends after {before + decay:,} steps"
        yield f"the decay of lr_scheduler_type {name} {end}, and the run has {steps:,}"
    elif options and steps - warmup > FEW_STEPS and len(after_warmup) == 1:
        yield f"with lr_scheduler_kwargs {options} lr_scheduler_type {name} never lowers the learning rate"


def _rate_factor(recipe: RunRecipe, steps: int, warmup: int) -> Callable[[int], float]:
    """What transformers multiplies learning_rate by in step 0, 1, ... of the run."""
    import torch
    import transformers

    arguments = recipe.training_arguments
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments["learning_rate"])
    scheduler = cast(Any, transformers).get_scheduler(
        arguments["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=dict(arguments.get("lr_scheduler_kwargs") or {}),
    )
    return scheduler.lr_lambdas[0]


def _of_evaluations(recipe: RunRecipe, steps: int, steps_per_epoch: int) -> Iterator[str]:
    if not evaluates(recipe.values):
        return
    arguments, patience = recipe.training_arguments, recipe.early_stopping_patience
    times = count_events(recipe, "eval", steps, steps_per_epoch)
    often = (
        f"the run of {steps:,} steps evaluates {'never' if not times else 'once' if times == 1 else f'{times} times'}"
    )
    if not times:
        yield f"{often}, because eval_delay is {arguments['eval_delay']:g}"
    elif (
        arguments["eval_strategy"] == "steps"
        and "eval_steps" in recipe.given
        and step_count(arguments["eval_steps"], steps) > steps
    ):
        yield f"eval_steps is {arguments['eval_steps']:g} and the run has {steps:,} steps: it evaluates at the end only"
    if patience is not None and times <= patience:
        yield f"early_stopping_patience is {patience} and {often}: it cannot end early"
    if arguments.get("load_best_model_at_end") and times < 2:
        yield f"load_best_model_at_end has nothing to choose from: {often}"


def _of_reports(recipe: RunRecipe, steps: int) -> Iterator[str]:
    arguments = recipe.training_arguments
    for what, name, ending in (
        ("save", "save_steps", "the only checkpoint is that of the last step"),
        ("logging", "logging_steps", "metrics.jsonl and trackers get no training loss before the end"),
    ):
        given = name in recipe.given and arguments.get(f"{what}_strategy") == "steps"
        if given and step_count(arguments[name], steps) > steps:
            yield f"{name} is {arguments[name]:g} and the run has {steps:,} steps: {ending}"
