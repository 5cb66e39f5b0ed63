"""The metrics and columns of each kind of labels."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.classification.predictions import predicted
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.evaluation.metrics.classification import METRICS, classification_statistics
from isotune.evaluation.metrics.modules import CLASSES, Column, MetricModule, class_columns
from isotune.evaluation.metrics.multi_label import MULTI_LABEL_METRICS, multi_label_statistics
from isotune.evaluation.metrics.regression import REGRESSION_METRICS, regression_statistics
from isotune.evaluation.statistics.resampling import Statistic
from isotune.io.errors import UserError

ALL_METRICS = tuple(dict.fromkeys((*METRICS, *MULTI_LABEL_METRICS, *REGRESSION_METRICS)))


def statistics_of(
    task_type: str,
    labels: np.ndarray,
    outputs: np.ndarray,
    *,
    ordinal: bool = False,
    names: Sequence[str] | None = None,
    thresholds: Thresholds = THRESHOLD,
) -> list[Statistic]:
    """All statistics of labels, [rows] or [rows, labels], and of probabilities [rows, classes] or numbers [rows].

    `thresholds` are those from which a row has a label, `ordinal` is of classes.
    """
    if task_type == REGRESSION:
        return regression_statistics(labels, outputs)
    if task_type == MULTI_LABEL:
        return multi_label_statistics(labels, outputs, names, thresholds)
    return classification_statistics(labels, outputs, ordinal=ordinal, names=names)


def columns_of(
    task_type: str, labels: np.ndarray, outputs: np.ndarray, thresholds: Thresholds = THRESHOLD
) -> dict[Column, Any]:
    """The columns that a module of `evaluate` may take."""
    if task_type == REGRESSION:
        return {("predictions", "float"): outputs, ("references", "float"): labels}
    if task_type == MULTI_LABEL:
        chosen = predicted(task_type, outputs, thresholds).astype(np.int64)
        scores = {("prediction_scores", "list of float"): outputs}
        return {("predictions", "list of int"): chosen, ("references", "list of int"): labels, **scores}
    return class_columns(labels, outputs)


ALL_COLUMNS = CLASSES | {*columns_of(MULTI_LABEL, np.zeros((1, 2), np.int64), np.full((1, 2), 0.5))}


def check_modules(modules: Sequence[MetricModule], task_type: str, columns: Collection[Column]) -> None:
    """Raise UserError for a module that takes what labels of this kind do not have."""
    for module in modules:
        absent = [column for column in module.columns if column not in columns]
        if absent:
            name, kind = absent[0]
            raise UserError(
                f"{module.where}: the module {module.facts['module']!r} takes {name} ({kind}), which task_type "
                f"{task_type} does not have"
            )
