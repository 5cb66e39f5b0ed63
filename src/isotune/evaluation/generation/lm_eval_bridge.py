"""Tasks of lm-evaluation-harness on a run's model, where that package is installed; it fetches nothing by itself.

A task is a YAML file of the harness's own format, or the name of one that the package carries. Names and numbers are
the harness's: `TASK/METRIC`, with `/FILTER` where a task has several; an interval is the value and 1.96 of its standard
errors to both sides.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.data.sources.hub import first_line
from isotune.evaluation.generation.batched_generation import GenerationModel
from isotune.evaluation.results import rows_digest, write_result
from isotune.io.errors import UserError
from isotune.io.near_names import nearest
from isotune.models.log_control import quiet_libraries

KIND = "lm_eval"
FILE_SUFFIXES = (".yaml", ".yml")
_SEED = 0
_ERRORS_95 = 1.959964


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found, in the form of every other evaluation."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    predictions: list[dict[str, Any]]
    version: str


def check_tasks(tasks: str) -> list[str]:
    """The tasks of a list with commas, files by their whole path; made before a model is loaded.

    Raises:
        UserError: lm-eval is not installed, a file is missing, or no task has this name.
    """
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--lm_eval_tasks needs lm-evaluation-harness: pip install 'isotune[lm-eval]'") from error
    named = [task.strip() for task in tasks.split(",") if task.strip()]
    if not named:
        raise UserError("--lm_eval_tasks names no task: give files or names, with commas between them")
    files = [task for task in named if task.endswith(FILE_SUFFIXES)]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--lm_eval_tasks: there is no task file {file}")
    if len(files) < len(named):
        with quiet_libraries():
            known = TaskManager().all_tasks
        for task in named:
            if task not in files and task not in known:
                near = nearest(task, known)
                hint = f": did you mean {near}?" if near else ", and no file (.yaml) either"
                raise UserError(f"--lm_eval_tasks: lm-eval has no task {task!r}{hint}")
    return [str(Path(task).resolve()) if task in files else task for task in named]


def run_tasks(speaker: GenerationModel, tasks: Sequence[str], *, limit: int | None, batch_size: int) -> HarnessResult:
    """Evaluate a model on what `check_tasks` returned, on one process.

    Raises:
        UserError: a task or its data cannot be loaded.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    try:
        with quiet_libraries():
            model = HFLM(pretrained=speaker.model, tokenizer=speaker.tokenizer, batch_size=batch_size)
            found: Any = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                limit=limit,
                random_seed=_SEED,
                numpy_random_seed=_SEED,
                torch_random_seed=_SEED,
                fewshot_random_seed=_SEED,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--lm_eval_tasks: {', '.join(tasks)} cannot be run: {first_line(error)}") from error
    metrics, intervals = _numbers(found["results"])
    return HarnessResult(metrics, intervals, _predictions(found["samples"]), lm_eval.__version__)


def write_harness(done: HarnessResult, folder: Path, *, model: str, tasks: Sequence[str]) -> None:
    """metrics.json and predictions.jsonl in `folder`."""
    facts = {
        "kind": KIND,
        "model": model,
        "dataset_name": ",".join(Path(task).stem if task.endswith(FILE_SUFFIXES) else task for task in tasks),
        "dataset_split": "the tasks' own",
        "rows": len(done.predictions),
        "rows_sha256": rows_digest((one["id"], one["document"]) for one in done.predictions),
        "lm_eval_version": done.version,
    }
    write_result(folder, facts, done.metrics, done.intervals, done.predictions)


def print_harness(done: HarnessResult) -> None:
    """Every metric with its interval."""
    for name, value in done.metrics.items():
        low, high = done.intervals.get(name, (math.nan, math.nan))
        print(f"  {name:<40} {value:>10.4f}   {low:.4f} to {high:.4f}")


def _numbers(results: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for task, found in results.items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not filtered or not isinstance(value, (int, float)):
                continue
            name = f"{task}/{metric}" + (f"/{filtered}" if filtered != "none" else "")
            error = found.get(f"{metric}_stderr,{filtered}")
            metrics[name] = float(value)
            if isinstance(error, (int, float)) and math.isfinite(error):
                intervals[name] = (value - _ERRORS_95 * error, value + _ERRORS_95 * error)
    return metrics, intervals


def _predictions(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line a document of each task, and a filter of it: what the harness says of it alone."""
    lines = []
    for task, found in samples.items():
        for one in found:
            filtered = one.get("filter", "none")
            row = f"{task}/{one['doc_id']}" + (f"/{filtered}" if filtered != "none" else "")
            numbers = {
                metric: one[metric] for metric in one.get("metrics", ()) if isinstance(one[metric], (int, float))
            }
            document = json.dumps(one["doc"], sort_keys=True, default=str)
            lines.append({"id": row, "task": task, "document": document, "target": str(one["target"]), **numbers})
    return lines
