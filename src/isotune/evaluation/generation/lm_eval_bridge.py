"""Tasks of lm-evaluation-harness on a run's model, where that package is installed.

A task is a YAML file in the harness's format, or the name of a task in the package. The metrics are the harness's:
`TASK/METRIC`, with `/FILTER` where a task has several; an interval is the value plus and minus 1.96 standard errors.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotune.evaluation.generation.base_rules import without_base_rules
from isotune.evaluation.models import GenerationModel
from isotune.evaluation.results import write_result
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import UserError, first_line, nearest
from isotune.io.extras import install_command
from isotune.models.log_control import quiet_libraries

KIND = "lm_eval"
FILE_SUFFIXES = (".yaml", ".yml")
SEEDS = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
_STANDARD_ERRORS_95 = 1.959964


def check_tasks(tasks: str) -> list[str]:
    """The tasks of a list with commas, files by their absolute path; checked before a model is loaded."""
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"--lm_eval_tasks needs lm-evaluation-harness: {install_command('lm_eval')}") from error
    names = [task.strip() for task in tasks.split(",") if task.strip()]
    if not names:
        raise UserError("--lm_eval_tasks names no task: give files or names, with commas between them")
    files = [task for task in names if task.endswith(FILE_SUFFIXES)]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--lm_eval_tasks: there is no task file {file}")
    if len(files) < len(names):
        with quiet_libraries():
            known = TaskManager().all_tasks
        for task in (name for name in names if name not in files and name not in known):
            near = nearest(task, known)
            hint = f": did you mean {near}?" if near else ", and no file (.yaml) either"
            raise UserError(f"--lm_eval_tasks: lm-eval has no task {task!r}{hint}")
    return [str(Path(task).resolve()) if task in files else task for task in names]


def run_tasks(
    lm: GenerationModel, tasks: Sequence[str], *, limit: int | None, batch_size: int
) -> tuple[Scores, list[dict[str, Any]]]:
    """Scores and predictions of a model on what `check_tasks` returned, on one process.

    UserError where a task or its data is broken.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    try:
        with quiet_libraries(), without_base_rules(lm.model):
            model = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size)
            result: Any = lm_eval.simple_evaluate(model=model, tasks=list(tasks), limit=limit, **SEEDS)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--lm_eval_tasks: {', '.join(tasks)} cannot be run: {first_line(error)}") from error
    return _scores(result["results"]), _predictions(result["samples"])


def content_of_task(task: str) -> str:
    """A digest of a task's YAML file; the name of a task that the harness brings."""
    return hashlib.sha256(Path(task).read_bytes()).hexdigest() if task.endswith(FILE_SUFFIXES) else task


def write_harness(
    scores: Scores, predictions: list[dict[str, Any]], folder: Path, *, model: str, tasks: Sequence[str]
) -> None:
    """metrics.json and predictions.jsonl in `folder`."""
    import lm_eval  # pyright: ignore[reportMissingImports]

    facts = {
        "kind": KIND,
        "model": model,
        "dataset_name": ",".join(Path(task).stem if task.endswith(FILE_SUFFIXES) else task for task in tasks),
        "dataset_split": "the tasks' own",
        "lm_eval_version": lm_eval.__version__,
    }
    write_result(folder, facts, scores, predictions, (line["document"] for line in predictions))


def _scores(results: dict[str, dict[str, Any]]) -> Scores:
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not filtered or not isinstance(value, (int, float)):
                continue
            name = f"{task}/{metric}" + (f"/{filtered}" if filtered != "none" else "")
            error = values.get(f"{metric}_stderr,{filtered}")
            metrics[name] = float(value)
            if isinstance(error, (int, float)) and math.isfinite(error):
                intervals[name] = (value - _STANDARD_ERRORS_95 * error, value + _STANDARD_ERRORS_95 * error)
    return Scores(metrics, intervals)


def _predictions(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line for each document and filter of each task, with the metrics of this document alone."""
    lines = []
    for task, documents in samples.items():
        for sample in documents:
            filtered = sample.get("filter", "none")
            row = f"{task}/{sample['doc_id']}" + (f"/{filtered}" if filtered != "none" else "")
            metrics = {m: sample[m] for m in sample.get("metrics", ()) if isinstance(sample[m], int | float)}
            document = json.dumps(sample["doc"], sort_keys=True, default=str)
            lines.append({"id": row, "task": task, "document": document, "target": str(sample["target"]), **metrics})
    return lines
