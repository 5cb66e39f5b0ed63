"""What state a run is in by its files and its lease: a run that was killed cannot say so itself."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isotune.config.recipes import task_of
from isotune.config.task_types import is_higher_better
from isotune.io.errors import UserError
from isotune.io.reading import Unreadable
from isotune.io.run_files import ENVIRONMENT, RECIPE, STATUS, or_empty, read_recipe_values, read_status
from isotune.run.metrics_file import METRICS, read_progress
from isotune.run.run_lease import ATTEMPT_RECORD, ATTEMPTS_DIR, Attempt, RunLease, holder_is_alive

FILES = (RECIPE, ENVIRONMENT, STATUS, METRICS)  # whose times tell when a run did something last


@dataclass(frozen=True)
class RunState:
    """A run as `isotune runs` lists it.

    Attributes:
        state: running, killed, preempted, paused, finished or failed; not started where there is a recipe alone.
        step: the last step that metrics.jsonl or a checkpoint has.
        steps: of the whole run; None where no file says it.
        metric: the name of the metric that chooses the best model, or eval_loss; None without an evaluation.
        best: its best value, at `best_step`.
        age_seconds: since a file of the run changed last.
    """

    run: str
    state: str
    task: str | None
    step: int
    steps: int | None
    metric: str | None
    best: float | None
    best_step: int | None
    age_seconds: float
    message: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders below these, or these themselves, by their names; UserError for what is no folder."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        found += _runs_below(folder)
    return list(dict.fromkeys(found))


def _runs_below(folder: Path) -> Iterator[Path]:
    for place, names, files in os.walk(folder):
        if RECIPE in files or ENVIRONMENT in files:
            yield Path(place)
            if {ENVIRONMENT, STATUS} & set(files) or ATTEMPTS_DIR in names:  # else a recipe beside its runs
                names.clear()  # a run holds no other
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in names:  # os.walk follows no link; a run on another disk has one
            run = Path(place, name)
            if run.is_symlink() and ((run / RECIPE).is_file() or (run / ENVIRONMENT).is_file()):
                yield run


def word_of_run(run: Path) -> str:
    """The state of a run in a word, as of `state_of_run`, without reading its metrics."""
    return _state(run, or_empty(read_status, run))


def state_of_run(run: Path, now_seconds: float | None = None) -> RunState:
    """The state of a run; what is missing or broken of its files counts as not there."""
    status, recipe = or_empty(read_status, run), or_empty(read_recipe_values, run)
    step, steps = status.get("step", 0), status.get("steps")
    if steps is None and recipe.get("max_steps", -1) > 0:
        steps = recipe["max_steps"]
    metric = best = best_step = None
    with contextlib.suppress(FileNotFoundError, Unreadable):
        last, evaluations = read_progress(run / METRICS)
        step = max(step, last)
        metric = recipe.get("metric_for_best_model") or "eval_loss"
        values = {at: line[metric] for at, line in evaluations.items() if line.get(metric) is not None}
        if values:
            choose = max if is_higher_better(metric, recipe) else min
            best_step = choose(values, key=values.__getitem__)
            best = values[best_step]
    age = (time.time() if now_seconds is None else now_seconds) - _last_change(run)
    return RunState(
        run=str(run),
        state=_state(run, status),
        task=task_of(recipe),
        step=step,
        steps=steps,
        metric=metric if best is not None else None,
        best=best,
        best_step=best_step,
        age_seconds=max(age, 0.0),
        message=status.get("message"),
    )


def _state(run: Path, status: dict[str, Any]) -> str:
    if holder_is_alive(run):
        return "running"
    said = status.get("status")
    if said == "running" or (said is None and ((run / ATTEMPTS_DIR).is_dir() or (run / STATUS).exists())):
        return "killed"
    if said in ("preempted", "paused", "failed") and _is_of_earlier_attempt(run, status):
        return "killed"
    return said or "not started"


def _is_of_earlier_attempt(run: Path, status: dict[str, Any]) -> bool:
    """Whether the last attempt took the lease and then neither ended nor said anything: it was killed before a step."""
    unended = RunLease(run).active()
    last = Attempt.read(unended[-1] / ATTEMPT_RECORD) if unended else None
    return last is not None and status.get("pid", last.pid) != last.pid


def _last_change(run: Path) -> float:
    """Seconds since 1970 at which one of the run's own files changed last."""
    changed = [0.0]
    for name in FILES:
        with contextlib.suppress(OSError):
            changed.append((run / name).stat().st_mtime)
    return max(changed)
