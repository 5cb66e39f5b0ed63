"""The lines of predictions: of the evaluations of a training run, of eval/classify.py and of `isotune predict`.

single_label   label and prediction are classes, and there is a probability for each class
multi_label    they are lists of the labels of a text, and there is a probability for each label
regression     they are numbers
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.data.classification.thresholds import THRESHOLD, Thresholds


def predicted(task_type: str, outputs: np.ndarray, thresholds: Thresholds = THRESHOLD) -> np.ndarray:
    """The likeliest class of each row, int64 [rows]; its labels, bool [rows, labels]; or its number, [rows].

    `outputs` are probabilities [rows, classes or labels], or the numbers themselves. `thresholds` are those of labels.
    """
    if task_type == SINGLE_LABEL:
        return outputs.argmax(axis=1)
    return outputs >= np.asarray(thresholds) if task_type == MULTI_LABEL else outputs


def prediction_lines(
    task_type: str,
    ids: Sequence[Any],
    labels: np.ndarray | None,
    outputs: np.ndarray,
    names: Sequence[str] | None,
    thresholds: Thresholds = THRESHOLD,
) -> list[dict[str, Any]]:
    """A line for each row; `names` are those of classes or labels, where they have any, and `labels` where known."""
    columns: dict[str, list[Any]] = {"id": list(ids)}
    for key, values in (("label", labels), ("prediction", predicted(task_type, outputs, thresholds))):
        if values is None:
            continue
        columns[key] = [np.flatnonzero(row).tolist() for row in values] if task_type == MULTI_LABEL else values.tolist()
    if task_type != REGRESSION:
        columns["probabilities"] = outputs.tolist()
        for key in [key for key in ("label", "prediction") if names and key in columns]:
            columns |= _named(task_type, key, columns[key], names or ())
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _named(task_type: str, key: str, values: list[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    if task_type == SINGLE_LABEL:
        return {f"{key}_name": [names[number] for number in values]}
    return {f"{key}_names": [[names[number] for number in row] for row in values]}


def in_words(task_type: str, value: Any, names: Sequence[str]) -> str:
    """A label or prediction of one row for people: the name of a class, those of labels, or a number."""
    if task_type == REGRESSION:
        return f"{value:.4g}"
    if task_type == SINGLE_LABEL:
        return str(names[value])
    return ", ".join(name for name, is_there in zip(names, value, strict=True) if is_there) or "no label"
