"""Metrics of predicted classes, and every classification metric of a set of predictions.

All metrics of predicted classes are functions of sums over rows (`statistics.resampling`), so the same code gives the
value and its interval. A class that is neither among the labels nor among the predictions is left out of the means, as
in scikit-learn; a precision or recall of 0 / 0 is 0 where the class is on the other side.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from isotune.evaluation.metrics.probabilities import probability_statistics
from isotune.evaluation.statistics import resampling
from isotune.evaluation.statistics.resampling import RESAMPLES, OfSums, Scores, Statistic, mean
from isotune.io.errors import UserError

KINDS = ("precision", "recall", "f1")
AVERAGES = ("macro", "micro", "weighted")
METRICS = (
    "accuracy", *KINDS, *(f"{kind}_{average}" for kind in KINDS for average in AVERAGES),
    "log_loss", "brier", "expected_calibration_error", "roc_auc", "pr_auc", "mean_absolute_error", "quadratic_kappa",
)  # fmt: skip
CLASS_SUFFIX = "_class_"  # before the number of a class: f1_class_0


def is_classification_metric(name: str) -> bool:
    """Whether `name` is a built-in metric, with or without the class that it is of."""
    return name.split(CLASS_SUFFIX)[0] in METRICS


def classification_statistics(
    labels: np.ndarray, probabilities: np.ndarray, *, ordinal: bool = False
) -> list[Statistic]:
    """All statistics of labels, integer [rows], and probabilities, float64 [rows, classes].

    The prediction of a row is its likeliest class, the lowest of equally likely ones. `ordinal` adds the metrics of
    ordered classes.
    """
    predictions = probabilities.argmax(axis=1)
    return [
        *label_statistics(labels, predictions, probabilities.shape[1]),
        *probability_statistics(labels, probabilities),
        *(ordinal_statistics(labels, predictions) if ordinal else []),
    ]


def select_names(statistics: Sequence[Statistic], only: Iterable[str] | None) -> set[str]:
    """The names among those of `statistics` that `only` selects, all where it is None or empty; see `score`."""
    names = {name: name.split(CLASS_SUFFIX)[0] for statistic in statistics for name in statistic.names}
    selected = set(only or names)
    unknown = sorted(selected - names.keys() - set(names.values()))
    if unknown:
        known = ", ".join(sorted(set(names.values())))
        raise UserError(f"metrics: there is no {unknown[0]!r} here; there are {known}")
    return {name for name, kind in names.items() if name in selected or kind in selected}


def score(
    statistics: Sequence[Statistic],
    rows: int,
    *,
    only: Iterable[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Values and intervals of statistics.

    Args:
        only: the metrics to keep, by name or by the name before `_class_k`; all where it is None or empty.

    Raises:
        UserError: `only` names a metric that does not exist.
    """
    return resampling.score(statistics, rows, only=select_names(statistics, only), resamples=resamples, seed=seed)


def label_statistics(labels: np.ndarray, predictions: np.ndarray, classes: int) -> list[Statistic]:
    """accuracy; precision, recall and F1 in the macro, micro and weighted mean, and of each class k as `..._class_k`.

    Args:
        labels, predictions: integer [rows], from 0 to classes - 1.
        classes: K, at least 1.
    """
    numbers = np.arange(classes)
    is_label, is_prediction = labels[:, None] == numbers, predictions[:, None] == numbers
    columns = np.hstack([is_label & is_prediction, is_label, is_prediction]).astype(np.float64)
    per_class = [f"{kind}{CLASS_SUFFIX}{k}" for kind in KINDS for k in numbers]
    means = [f"{kind}_{average}" for kind in KINDS for average in AVERAGES]
    hits, of_label, of_prediction = ([start + k for k in range(classes)] for start in (0, classes, 2 * classes))
    shares = dict.fromkeys(["accuracy", *(f"{kind}_micro" for kind in KINDS)], (hits, of_label))
    shares |= {f"precision{CLASS_SUFFIX}{k}": ([hits[k]], [of_prediction[k]]) for k in range(classes)}
    shares |= {f"recall{CLASS_SUFFIX}{k}": ([hits[k]], [of_label[k]]) for k in range(classes)}
    return [OfSums(("accuracy", *means, *per_class), columns, _from_counts, shares)]


def ordinal_statistics(labels: np.ndarray, predictions: np.ndarray) -> list[Statistic]:
    """mean_absolute_error, in classes; quadratic_kappa (Cohen 1968), undefined where chance gives no error.

    Args:
        labels, predictions: integer [rows]; class k + 1 is one step from class k.
    """
    y, p = labels.astype(np.float64), predictions.astype(np.float64)
    columns = np.column_stack([np.ones(len(y)), y, y**2, p, p**2, (y - p) ** 2])
    return [mean("mean_absolute_error", np.abs(y - p)), OfSums(("quadratic_kappa",), columns, _kappa)]


def _from_counts(sums: np.ndarray) -> np.ndarray:
    """[block, 3 K] counts of hits, labels and predictions of each class -> [block, 1 + 9 + 3 K] statistics."""
    hits, labels, predictions = np.split(sums, 3, axis=1)
    present = labels + predictions > 0
    scores = np.stack(
        [
            _share(hits, predictions, present),
            _share(hits, labels, present),
            2 * _share(hits, labels + predictions, present),
        ],
        axis=1,
    )
    rows = labels.sum(axis=1)
    accuracy = hits.sum(axis=1) / rows
    known = np.where(present[:, None], scores, 0.0)
    macro = known.sum(axis=2) / present.sum(axis=1)[:, None]
    weighted = (known * labels[:, None]).sum(axis=2) / rows[:, None]
    micro = np.repeat(accuracy[:, None], len(KINDS), axis=1)
    means = np.stack([macro, micro, weighted], axis=2).reshape(len(sums), -1)
    return np.hstack([accuracy[:, None], means, scores.reshape(len(sums), -1)])


def _share(part: np.ndarray, whole: np.ndarray, present: np.ndarray) -> np.ndarray:
    shares = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return np.where(present, shares, np.nan)


def _kappa(sums: np.ndarray) -> np.ndarray:
    """1 - (observed squared distance) / (squared distance of the same two columns in independent order)."""
    rows, y, y2, p, p2, observed = sums.T
    by_chance = y2 + p2 - 2 * y * p / rows
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(by_chance > 0, 1 - observed / by_chance, np.nan)[:, None]
