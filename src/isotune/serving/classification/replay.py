"""A classifier's stored predictions made again: the same class, and no probability that differs by more than 1e-6."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.predictions import predicted
from isotune.evaluation.classification.evaluate import Rows, read_task_rows
from isotune.evaluation.classification.examples import EXAMPLES, examples_of, kept_errors
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier, task_of_run
from isotune.evaluation.results import find_results
from isotune.evaluation.tasks import ClassificationTask, read_task
from isotune.io.errors import UserError, shown
from isotune.serving.classification.service import ClassifierService, Outputs
from isotune.serving.replay import Evaluated, Replayed, spread

TOLERANCE = 1e-6  # of a probability; of a number relative to the largest stored one, where that is above 1


def why_not(evaluated: Evaluated, classifier: Classifier) -> str | None:
    """Why a result cannot be compared with what is served; None where it can.

    Requests have the length and label thresholds of the run, and an evaluation may have had others.
    """
    if (reason := why_read_otherwise(evaluated, classifier)) is not None:
        return reason
    own = evaluated.result.facts.get("label_thresholds")
    if own is not None and not _same_thresholds(own, classifier):
        served = np.atleast_1d(classifier.thresholds).tolist()
        return f"its label_thresholds are {shown(own)}, and {shown(served)} are served"
    return None


def why_read_otherwise(evaluated: Evaluated, classifier: Classifier) -> str | None:
    """Why an evaluation has other outputs than are served, whatever its labels' thresholds; None where it has not."""
    dtype = evaluated.claim.get("dtype")
    if dtype != "float32":
        return f"its dtype is {dtype}, and a classifier is served in float32"
    for key in ("max_seq_length", "overlong"):
        served = getattr(classifier.settings, key)
        if (own := evaluated.claim.get(key) or served) != served:
            return f"its {key} is {own}, and {served} is served"
    return None


def _same_thresholds(own: list[float], classifier: Classifier) -> bool:
    labels = classifier.num_labels
    served = np.broadcast_to(np.asarray(classifier.thresholds, np.float64), labels)
    return len(own) in (1, labels) and bool((served == own).all())


def rows_of(evaluated: Evaluated, classifier: Classifier) -> Rows:
    """The rows of an evaluation, known by their digest; UserError where the data are others now."""
    keys = evaluated.task_keys(ClassificationTask)
    own = {key: keys.get(key) for key in ("max_seq_length", "label_thresholds")}
    ranks, limit, why = Ranks(0, 1, classifier.device), evaluated.claim.get("limit"), "their content has changed"
    for of_recipe in (True, False):  # of the recipe they may be the share that was held out of training
        try:
            task, held_out = task_of_run(classifier, own) if of_recipe else (None, None)
            if task is None or task.dataset_name != keys["dataset_name"]:
                task, held_out = read_task(ClassificationTask, None, keys), None
            with contextlib.redirect_stdout(io.StringIO()):  # their evaluation printed the table of the data
                rows = read_task_rows(task, classifier, ranks, limit, held_out)
            if rows.fingerprint == evaluated.claim.get("data"):
                return rows
        except UserError as error:
            why = str(error)
    raise evaluated.no_rows(why)


def replay(evaluated: Evaluated, service: ClassifierService, rows: Rows, count: int) -> Replayed:
    """Predict `count` rows from all over an evaluation again; UserError where it is of other classes."""
    stored = evaluated.result.predictions
    chosen = spread(len(stored), count)
    outputs = service.outputs((rows.documents.select(np.array(chosen)),))
    return compare(evaluated, [stored[row] for row in chosen], outputs, service.says)


def compare(
    evaluated: Evaluated, lines: Sequence[dict[str, Any]], outputs: np.ndarray, says: Outputs, note: str = ""
) -> Replayed:
    """Compare stored lines of an evaluation with what is predicted of the same rows now."""
    task_type, identical, largest, first = says.task_type, 0, 0.0, None
    for line, output, guess in zip(lines, outputs, predicted(task_type, outputs, says.thresholds), strict=True):
        before = np.asarray(line["prediction" if task_type == REGRESSION else "probabilities"])
        if before.shape != np.shape(output):
            raise evaluated.no_rows(f"it has {before.size} outputs, and the model {np.size(output)}")
        difference = float(np.abs(before - output).max())
        allowed = TOLERANCE * (max(1.0, float(np.abs(before))) if task_type == REGRESSION else 1.0)
        now = np.flatnonzero(guess).tolist() if task_type == MULTI_LABEL else guess.tolist()
        if difference <= allowed and (task_type == REGRESSION or now == line["prediction"]):
            identical += 1
        elif first is None:
            first = line["id"]
        largest = max(largest, difference)
    return Replayed(evaluated.result.folder, identical, len(lines), first, largest, note)


def errors_among(evaluated: Evaluated, rows: Rows) -> list[dict[str, Any]]:
    """All rows that the model got wrong, with their texts; of a regression those that the evaluation kept."""
    stored = evaluated.result.predictions
    if rows.task_type == REGRESSION:
        return kept_errors(evaluated.result.folder)
    wrong = [number for number, line in enumerate(stored) if line["prediction"] != line["label"]]
    outputs = np.array([line["probabilities"] for line in stored])
    return examples_of(rows.task_type, wrong, rows.ids, rows.labels, outputs, rows.names, rows.texts, rows.thresholds)


def newest_errors(run: Path) -> list[dict[str, Any]]:
    """The errors that the newest evaluation of a run kept with their texts; none where there is no such file."""
    files = [folder / EXAMPLES for folder in find_results(run) if (folder / EXAMPLES).is_file()]
    return kept_errors(max(files, key=lambda file: file.stat().st_mtime_ns).parent) if files else []
