"""Every classification metric of a set of predictions with its interval: one list for scripts, files and reports."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from isotune.evaluation.metrics.labels import label_statistics, ordinal_statistics
from isotune.evaluation.metrics.probabilities import probability_statistics
from isotune.evaluation.statistics.resampling import RESAMPLES, Statistic, bootstrap_intervals, values
from isotune.io.errors import UserError


@dataclass(frozen=True)
class Scores:
    """Metrics and their 95% intervals by name; `undefined` names those that these rows cannot have."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    undefined: list[str]


def classification_statistics(
    labels: np.ndarray, probabilities: np.ndarray, *, ordinal: bool = False
) -> list[Statistic]:
    """All statistics of labels, integer [rows], and probabilities, float64 [rows, classes]; see `metrics_*.py`.

    The prediction of a row is its likeliest class, the lowest of equally likely ones. `ordinal` adds those of ordered
    classes.
    """
    predictions = probabilities.argmax(axis=1)
    return [
        *label_statistics(labels, predictions, probabilities.shape[1]),
        *probability_statistics(labels, probabilities),
        *(ordinal_statistics(labels, predictions) if ordinal else []),
    ]


def chosen_names(statistics: Sequence[Statistic], only: Iterable[str]) -> set[str]:
    """The names among those of `statistics` that `only` asks for, all where it asks for none; see `score`."""
    names = {name: name.split("_class_")[0] for one in statistics for name in one.names}
    wanted = set(only) or set(names)
    unknown = sorted(wanted - names.keys() - set(names.values()))
    if unknown:
        there = ", ".join(sorted(set(names.values())))
        raise UserError(f"metrics: there is no {unknown[0]!r} here; there are {there}")
    return {name for name, kind in names.items() if name in wanted or kind in wanted}


def score(
    statistics: Sequence[Statistic],
    rows: int,
    *,
    only: Iterable[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Values and intervals of statistics.

    Args:
        only: the metrics to keep, by name, or by the name that stands before `_class_k`; all where there is none.

    Raises:
        UserError: `only` names a metric that there is not.
    """
    found = values(statistics)
    kept = chosen_names(statistics, only)
    metrics = {name: value for name, value in found.items() if name in kept and math.isfinite(value)}
    needed = [one for one in statistics if metrics.keys() & set(one.names)]
    intervals = bootstrap_intervals(needed, rows, resamples, seed)
    return Scores(
        metrics,
        {name: intervals[name] for name in metrics if name in intervals},
        sorted(kept - metrics.keys()),
    )
