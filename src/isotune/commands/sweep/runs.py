"""The runs of a sweep, one after the other: each is an ordinary run that `isotune sft` or `classify` does in a process.

A run that has finished is not repeated, and one that was stopped goes on from its newest checkpoint.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from isotune.commands import start
from isotune.commands.sweep.plan import RECIPE_FILE, Plan
from isotune.commands.sweep.space import Values
from isotune.evaluation.results import METRICS as RESULT
from isotune.evaluation.results import Result, read_result
from isotune.io.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, MEMORY, VALUES, Preempted, RunFault, UserError
from isotune.io.files import replace_file
from isotune.io.run_files import or_refuse, read_recipe_values
from isotune.run.metrics_file import METRICS, read_progress
from isotune.run.run_state import state_of_run

TEST_TASK, TEST_NAME = "test.yaml", "sweep_test"
MOST_WAITED_SECONDS = 60  # for a run of a killed sweep, which stops with a checkpoint
COLUMNS = ("dataset_text_field", "dataset_text_pair_field", "dataset_label_field", "dataset_id_field")
FAILING = (MEMORY, VALUES)  # mistakes of a trial's values alone; others would meet every trial
CONVERSATION_COLUMNS = ("dataset_text_field", "dataset_prompt_field", "dataset_completion_field")


class TrialFailed(Exception):
    """A run of a trial ended with a fault, which its message says; other trials may do better."""


def folder_of(plan: Plan, trial: int, seed: int) -> Path:
    """SWEEP/trial-003/seed-42."""
    return plan.folder / f"trial-{trial:03}" / f"seed-{seed}"


def train(plan: Plan, trial: int, values: Values, seed: int) -> float:
    """The metric of the model that one run keeps, after the run where it is not there.

    TrialFailed where the run ended by a fault of its own, as a loss that is not finite, too little memory for its
    values, or being killed twice. UserError or Preempted where the sweep cannot go on either.
    """
    run = folder_of(plan, trial, seed)
    _wait_for(run)
    if state_of_run(run).state != "finished":
        flags = {**(values if trial else {}), "seed": seed, "output_dir": str(run)}  # trial 0 is the recipe itself
        words = [f"--{name}={_word(value)}" for name, value in flags.items()]
        _do(
            run,
            [plan.command, "--config", str(plan.folder / RECIPE_FILE), *words, *plan.launch],
            FAILING if trial else (),
        )
    return _kept_value(plan, run)


def examine(plan: Plan, trial: int, seed: int) -> Result:
    """The evaluation of a run's model on the rows that the search did not see, made where it is not there."""
    run = folder_of(plan, trial, seed)
    result = run / "eval" / TEST_NAME
    if not (result / RESULT).is_file():
        flags = _test_flags(plan, or_refuse(read_recipe_values, run, f"{run}: its recipe cannot be read"))
        try:
            _do(run, ["eval", str(run), *flags, "--output_dir", str(result), *plan.launch])
        except TrialFailed as error:
            raise RunFault(str(error)) from None
    return read_result(result)


def tested_trials(plan: Plan) -> list[int]:
    """The trials that were examined on the test rows, by this and earlier calls."""
    tested = plan.folder.glob(f"trial-*/seed-*/eval/{TEST_NAME}/{RESULT}")
    return sorted({int(file.parents[3].name.removeprefix("trial-")) for file in tested})


def _test_flags(plan: Plan, recipe: Mapping[str, Any]) -> list[str]:
    if plan.command == "sft":
        columns = {name: recipe[name] for name in CONVERSATION_COLUMNS if name in plan.recipe.given}
        keys = {"dataset_name": plan.test.keys["dataset_name"], "dataset_split": plan.test.keys["dataset_split"]}
        return [word for name, value in {**keys, **columns}.items() for word in (f"--{name}", str(value))]
    columns = {name: recipe[name] for name in (*COLUMNS, "dataset_columns") if recipe.get(name) is not None}
    if recipe.get("label_source", "column") != "column":  # of the rows that the search did not see too
        columns = {name: own for name, own in columns.items() if name != "dataset_label_field"}
        columns["label_source"] = recipe["label_source"]
    file = plan.folder / TEST_TASK
    replace_file(file, yaml.safe_dump({**plan.test.keys, **columns}, sort_keys=False, allow_unicode=True))
    return ["--task", str(file), "--no_pictures"]


def _do(run: Path, words: list[str], failing: Sequence[str] = ()) -> None:
    """Run a command of this sweep; raises what its end means for the trial and the sweep.

    A mistake stops the sweep, but for one whose reason is among `failing`.
    A process that ends without a word was killed, often by the kernel for its memory: it goes on once.
    """
    ended = start.run_command(words)
    if ended.exit_status and ended.message is None:
        print(f"sweep       {run} was ended with status {ended.exit_status} and said nothing: it goes on", flush=True)
        ended = start.run_command(words)
        if ended.exit_status and ended.message is None:
            raise TrialFailed(f"{run}: it was ended twice with status {ended.exit_status} and said nothing")
    said = f"{run}: {ended.message}"
    if ended.exit_status == EXIT_USER_ERROR:
        raise TrialFailed(said) if ended.reason in failing else UserError(said)
    if ended.exit_status == EXIT_PREEMPTED:
        raise Preempted(f"{said}; the same sweep goes on from there")
    if ended.exit_status:
        raise TrialFailed(said)


def _kept_value(plan: Plan, run: Path) -> float:
    """The metric of the evaluation whose model the run keeps: the best, with load_best_model_at_end, else the last."""
    _, evaluations = or_refuse(read_progress, run / METRICS, f"{run / METRICS}: cannot be read")
    values = [line.get(plan.metric) for _, line in sorted(evaluations.items())]
    if not values:
        raise UserError(f"{run} has ended without an evaluation: let it evaluate at its end, by eval_steps")
    finite = [value for value in values if value is not None]
    if not finite or (values[-1] is None and not plan.recipe.values["load_best_model_at_end"]):
        raise TrialFailed(f"{run}: {plan.metric} is not a finite number, or no metric of these data")
    if plan.recipe.values["load_best_model_at_end"]:
        return (max if plan.higher_is_better else min)(finite)
    return finite[-1]


def _wait_for(run: Path) -> None:
    """Let a run that a killed sweep has left come to its checkpoint."""
    end = time.monotonic() + MOST_WAITED_SECONDS
    while state_of_run(run).state == "running" and time.monotonic() < end:
        time.sleep(0.2)


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
