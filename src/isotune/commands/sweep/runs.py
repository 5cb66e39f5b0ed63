"""The runs of a sweep: each is an ordinary run that `isotune sft` or `classify` does in a process or a job of its own.

A run that has finished is not repeated, and one that was stopped goes on from its newest checkpoint.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from isotune.commands.start import Ended
from isotune.commands.sweep.plan import RECIPE_FILE, Plan
from isotune.commands.sweep.processes import Command, Ends
from isotune.commands.sweep.ranking import Trial
from isotune.commands.sweep.space import Values
from isotune.evaluation.results import METRICS as RESULT
from isotune.evaluation.results import Result, read_result
from isotune.io.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, MEMORY, VALUES, Preempted, RunFault, UserError
from isotune.io.files import replace_file
from isotune.io.reading import Unreadable
from isotune.io.run_files import or_refuse, read_recipe_values
from isotune.io.variables import PAUSE
from isotune.run.metrics_file import METRICS, read_progress
from isotune.run.run_state import word_of_run

TEST_TASK, TEST_NAME = "test.yaml", "sweep_test"
COLUMNS = ("dataset_text_field", "dataset_text_pair_field", "dataset_label_field", "dataset_id_field")
FAILING = (MEMORY, VALUES)  # mistakes of a trial's values alone; others would meet every trial
CONVERSATION_COLUMNS = ("dataset_text_field", "dataset_prompt_field", "dataset_completion_field")


class TrialFailed(Exception):
    """A run of a trial ended with a fault, which its message says; other trials may do better."""


@dataclass(frozen=True)
class Evaluation:
    """Of a run: after which step, with which value, None where undefined, and whether the run is over with it."""

    step: int
    value: float | None
    is_last: bool


class Machine(Protocol):
    """What runs the commands: the processes of this machine, or the jobs of a cluster."""

    def wait_for(self, run: Path) -> None:
        """Until a run that an earlier call has left is no longer at work."""
        ...

    def run(self, commands: deque[Command]) -> Ends:
        """Run them, and yield each with its end; one that is put into the queue meanwhile is run too."""
        ...


def folder_of(plan: Plan, trial: int, seed: int) -> Path:
    """SWEEP/trial-003/seed-42."""
    return plan.folder / f"trial-{trial:03}" / f"seed-{seed}"


def train(plan: Plan, machine: Machine, values: Mapping[int, Values]) -> list[Trial]:
    """Trials by their numbers, each with the metric of the models that its runs keep, trained where they are not there.

    A trial has failed where one of its runs ended by a fault of its own, as a loss that is not finite, too little
    memory for its values, or being killed twice; the first seed's fault is told. UserError or Preempted where the sweep
    cannot go on either.
    """
    failures = train_runs(plan, machine, values, plan.seeds)
    trials: list[Trial] = []
    for number, tried in values.items():
        if (failure := failures.get(number)) is not None:
            trials.append(failed(number, tried, failure))
        else:
            scores = tuple(_kept_value(plan, folder_of(plan, number, seed)) for seed in plan.seeds)
            trials.append(Trial(number, tried, scores))
    return trials


def failed(number: int, values: Values, failure: str) -> Trial:
    """A trial that has failed, which is said."""
    print(f"sweep       trial {number} has failed: {failure}", flush=True)
    return Trial(number, values, failure=failure)


def train_runs(
    plan: Plan, machine: Machine, values: Mapping[int, Values], seeds: Sequence[int], evaluations: int = 0
) -> dict[int, str]:
    """Train the runs of trials with these seeds where they are not done; what is wrong with the trials that failed.

    A run is done where it has finished, or has so many evaluations, at which it pauses; 0: it goes on to its end.
    """
    failures = {number: {0: wrong} for number in values if number and (wrong := plan.contradiction(values[number]))}
    runs = {folder_of(plan, n, seed): (n, seed) for n in values if n not in failures for seed in seeds}
    queue: deque[Command] = deque()

    def has_ended(run: Path, ended: Ended) -> None:
        number, seed = runs[run]
        try:
            _check(run, ended, FAILING if number else ())
            if not evaluations:
                _kept_value(plan, run)
        except TrialFailed as error:
            failures.setdefault(number, {})[seed] = str(error)

    for run in runs:
        machine.wait_for(run)
        if _is_done(run, evaluations):
            has_ended(run, Ended(0))
        else:
            number, seed = runs[run]
            queue.append(_training(plan, number, seed, values[number], evaluations))
    _drop(queue, failures)

    def on_end(command: Command, ended: Ended) -> None:
        if (
            ended.exit_status == 0
            and word_of_run(command.folder) == "paused"
            and not _is_done(command.folder, evaluations)
        ):
            queue.append(command)  # it was a job of an earlier call, which was to come to an earlier evaluation
            return
        has_ended(command.folder, ended)
        _drop(queue, failures)

    _run(machine, queue, on_end)
    return {number: of_seeds[min(of_seeds)] for number, of_seeds in failures.items()}


def _drop(queue: deque[Command], failures: Mapping[int, object]) -> None:
    """Take out of the queue what is of trials that have failed."""
    for command in [command for command in queue if command.trial in failures]:
        queue.remove(command)


def evaluation_of(plan: Plan, trial: int, number: int) -> Evaluation:
    """An evaluation of the first seed's run, which has that many or has finished with fewer: then its last."""
    run = folder_of(plan, trial, plan.seeds[0])
    last_step, evaluations = or_refuse(read_progress, run / METRICS, f"{run / METRICS}: cannot be read")
    steps = _steps(evaluations)[:number]
    if not steps:
        raise UserError(f"{run} has ended without an evaluation: let it evaluate, by eval_steps")
    is_last = len(steps) < number or (steps[-1] == last_step and word_of_run(run) == "finished")
    return Evaluation(steps[-1], evaluations[steps[-1]].get(plan.metric), is_last)


def _is_done(run: Path, evaluations: int) -> bool:
    """Whether a run has finished, has paused at that evaluation, or is behind it; not one that was killed there."""
    state = word_of_run(run)
    if state == "finished" or not evaluations:
        return state == "finished"
    try:
        last_step, found = read_progress(run / METRICS)
    except (FileNotFoundError, Unreadable):
        return False
    steps = _steps(found)
    return len(steps) >= evaluations and (state == "paused" or steps[evaluations - 1] < last_step)


def _steps(evaluations: Mapping[int, object]) -> list[int]:
    """Of the evaluations that count: not of the one before the first step."""
    return sorted(step for step in evaluations if step)


def examine(plan: Plan, machine: Machine, trials: Sequence[int]) -> dict[int, list[Result]]:
    """The evaluations of trials' models on the rows that the search did not see, made where they are not there."""
    results = {number: [folder_of(plan, number, seed) / "eval" / TEST_NAME for seed in plan.seeds] for number in trials}
    queue = deque(
        _evaluation(plan, number, seed)
        for number, folders in results.items()
        for seed, result in zip(plan.seeds, folders, strict=True)
        if not (result / RESULT).is_file()
    )

    def on_end(command: Command, ended: Ended) -> None:
        try:
            _check(command.folder, ended)
        except TrialFailed as error:
            raise RunFault(str(error)) from None

    _run(machine, queue, on_end)
    return {number: [read_result(folder) for folder in folders] for number, folders in results.items()}


def _run(machine: Machine, queue: deque[Command], on_end: Callable[[Command, Ended], None]) -> None:
    """Run all, and call `on_end` for each; where that raises, the others are stopped.

    A process that ends without a word was killed, often by the kernel for its memory: it goes on once.
    """
    if not queue:
        return
    killed: set[Path] = set()
    with closing(machine.run(queue)) as ends:
        for command, ended in ends:
            if ended.exit_status and ended.message is None and command.folder not in killed:
                killed.add(command.folder)
                said = f"was ended with status {ended.exit_status} and said nothing: it goes on"
                print(f"sweep       {command.folder} {said}", flush=True)
                queue.appendleft(command)
            else:
                on_end(command, ended)


def _check(folder: Path, ended: Ended, failing: Sequence[str] = ()) -> None:
    """Raise what a command's end means for its trial and the sweep.

    A mistake stops the sweep, but for one whose reason is among `failing`.
    """
    if ended.exit_status and ended.message is None:
        raise TrialFailed(f"{folder}: it was ended twice with status {ended.exit_status} and said nothing")
    said = f"{folder}: {ended.message}"
    if ended.exit_status == EXIT_USER_ERROR:
        raise TrialFailed(said) if ended.reason in failing else UserError(said)
    if ended.exit_status == EXIT_PREEMPTED:
        raise Preempted(f"{said}; the same sweep goes on from there")
    if ended.exit_status:
        raise TrialFailed(said)


def _training(plan: Plan, trial: int, seed: int, values: Values, evaluations: int) -> Command:
    flags = {**(values if trial else {}), "seed": seed}  # trial 0 is the recipe itself
    words = [f"--{name}={_word(value)}" for name, value in flags.items()]
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    said = ", ".join(f"{key} {value}" for key, value in shown.items())
    return Command(
        folder_of(plan, trial, seed),
        [plan.command, "--config", str(plan.folder / RECIPE_FILE), *words],
        trial,
        f"trial {trial} of {plan.trials}, seed {seed}: {said}"
        + (f", to evaluation {evaluations}" if evaluations else ""),
        plan.logs / f"trial-{trial:03}_seed-{seed}.log",
        {PAUSE: str(evaluations)} if evaluations else {},
    )


def _evaluation(plan: Plan, trial: int, seed: int) -> Command:
    run = folder_of(plan, trial, seed)
    flags = _test_flags(plan, or_refuse(read_recipe_values, run, f"{run}: its recipe cannot be read"))
    return Command(
        run / "eval" / TEST_NAME,
        ["eval", str(run), *flags],
        trial,
        f"trial {trial}, seed {seed}, on {plan.test.in_words}",
        plan.logs / f"trial-{trial:03}_seed-{seed}_test.log",
    )


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


def _kept_value(plan: Plan, run: Path) -> float:
    """The metric of the evaluation whose model the run keeps: the best, with load_best_model_at_end, else the last."""
    _, evaluations = or_refuse(read_progress, run / METRICS, f"{run / METRICS}: cannot be read")
    values = [line.get(plan.metric) for step, line in sorted(evaluations.items()) if step]  # 0: of eval_on_start
    if not values:
        raise UserError(f"{run} has ended without an evaluation: let it evaluate at its end, by eval_steps")
    finite = [value for value in values if value is not None]
    if not finite or (values[-1] is None and not plan.recipe.values["load_best_model_at_end"]):
        raise TrialFailed(f"{run}: {plan.metric} is not a finite number, or no metric of these data")
    if plan.recipe.values["load_best_model_at_end"]:
        return (max if plan.higher_is_better else min)(finite)
    return finite[-1]


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
