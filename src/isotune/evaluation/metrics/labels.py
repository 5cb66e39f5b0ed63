"""Metrics of the classes that were chosen: accuracy, precision, recall, F1, and of ordered classes how far off.

All are functions of sums over rows (`statistics.resampling`), so the same code gives the value and its interval.
A class that stands neither among the labels nor among the predictions is left out of the means, as scikit-learn does;
a precision or recall of 0 / 0 is 0 where the class stands on the other side.
"""

import numpy as np

from isotune.evaluation.statistics.resampling import OfSums, Statistic, mean

KINDS = ("precision", "recall", "f1")
AVERAGES = ("macro", "micro", "weighted")


def label_statistics(labels: np.ndarray, predictions: np.ndarray, classes: int) -> list[Statistic]:
    """accuracy; precision, recall and F1 in the macro, micro and weighted mean, and of each class k as `..._class_k`.

    Args:
        labels, predictions: integer [rows], from 0 to classes - 1.
        classes: K, at least 1.
    """
    numbers = np.arange(classes)
    is_label, is_prediction = labels[:, None] == numbers, predictions[:, None] == numbers
    columns = np.hstack([is_label & is_prediction, is_label, is_prediction]).astype(np.float64)
    per_class = [f"{kind}_class_{k}" for kind in KINDS for k in numbers]
    means = [f"{kind}_{average}" for kind in KINDS for average in AVERAGES]
    hits, of_label, of_prediction = ([start + k for k in range(classes)] for start in (0, classes, 2 * classes))
    shares = dict.fromkeys(["accuracy", *(f"{kind}_micro" for kind in KINDS)], (hits, of_label))
    shares |= {f"precision_class_{k}": ([hits[k]], [of_prediction[k]]) for k in range(classes)}
    shares |= {f"recall_class_{k}": ([hits[k]], [of_label[k]]) for k in range(classes)}
    return [OfSums(("accuracy", *means, *per_class), columns, _of_counts, shares)]


def ordinal_statistics(labels: np.ndarray, predictions: np.ndarray) -> list[Statistic]:
    """mean_absolute_error, in classes; quadratic_kappa (Cohen 1968), which does not exist where chance is never off.

    Args:
        labels, predictions: integer [rows]; class k + 1 is one step from class k.
    """
    y, p = labels.astype(np.float64), predictions.astype(np.float64)
    columns = np.column_stack([np.ones(len(y)), y, y**2, p, p**2, (y - p) ** 2])
    return [mean("mean_absolute_error", np.abs(y - p)), OfSums(("quadratic_kappa",), columns, _kappa)]


def _of_counts(sums: np.ndarray) -> np.ndarray:
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
    hit_share = hits.sum(axis=1) / rows
    known = np.where(present[:, None], scores, 0.0)
    macro = known.sum(axis=2) / present.sum(axis=1)[:, None]
    weighted = (known * labels[:, None]).sum(axis=2) / rows[:, None]
    micro = np.repeat(hit_share[:, None], len(KINDS), axis=1)
    means = np.stack([macro, micro, weighted], axis=2).reshape(len(sums), -1)
    return np.hstack([hit_share[:, None], means, scores.reshape(len(sums), -1)])


def _share(part: np.ndarray, whole: np.ndarray, present: np.ndarray) -> np.ndarray:
    found = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return np.where(present, found, np.nan)


def _kappa(sums: np.ndarray) -> np.ndarray:
    """One less the squared distance that was seen, over the one of the same two columns in independent order."""
    rows, y, y2, p, p2, seen = sums.T
    by_chance = y2 + p2 - 2 * y * p / rows
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(by_chance > 0, 1 - seen / by_chance, np.nan)[:, None]
