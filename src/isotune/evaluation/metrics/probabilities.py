"""Metrics of probabilities: calibration and ranking.

log loss, Brier score and calibration error are functions of sums over rows; the areas under the ROC and the
precision-recall curve need the order of all rows, so they are functions of the resamples' weights.
"""

from collections.abc import Callable

import numpy as np

from isotune.evaluation.statistics.resampling import OfSums, OfWeights, Statistic, mean, share

BINS = 15  # of the calibration error, as in Guo et al. 2017, arXiv:1706.04599
SMALLEST = np.finfo(np.float64).eps  # smaller probabilities are clipped, because the log of 0 is infinite


def probability_statistics(labels: np.ndarray, probabilities: np.ndarray) -> list[Statistic]:
    """log_loss in nats; brier; expected_calibration_error; roc_auc and pr_auc.

    brier is the squared distance of all probabilities from the label, halved for two classes (Brier 1950, and as in
    scikit-learn). expected_calibration_error is over BINS bins of equal width of the highest probability. roc_auc (ties
    count half) and pr_auc (average precision) are of class 1 for two classes; for more, `..._class_k` is of class k
    against the others, and the name without a suffix is the mean over the classes for which it is defined. They are
    undefined where all rows are of one class.

    Args:
        labels: integer [rows].
        probabilities: float64 [rows, classes], at least two classes.
    """
    rows, classes = probabilities.shape
    truth = labels[:, None] == np.arange(classes)
    squared = ((probabilities - truth) ** 2).sum(axis=1)
    true_probability = np.clip(probabilities[np.arange(rows), labels], SMALLEST, 1 - SMALLEST)
    return [
        mean("log_loss", -np.log(true_probability)),
        share("brier", squared / 2) if classes == 2 else mean("brier", squared),
        calibration_error(labels, probabilities),
        ranking_statistics(labels, probabilities),
    ]


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> OfSums:
    """expected_calibration_error: the mean distance between confidence and accuracy over the bins."""
    confidence, correct = confidences(labels, probabilities)
    columns = np.zeros((len(labels), BINS + 1))
    columns[:, BINS] = 1
    columns[np.arange(len(labels)), bin_of(confidence)] = confidence - correct
    return OfSums(
        ("expected_calibration_error",),
        columns,
        lambda sums: np.abs(sums[:, :BINS]).sum(axis=1, keepdims=True) / sums[:, BINS:],
    )


def confidences(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest probability of each row, float64 [rows], and whether its class is the label, bool [rows]."""
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, integer [rows] from 0 to BINS - 1; a bin includes its upper edge."""
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def ranking_statistics(labels: np.ndarray, probabilities: np.ndarray) -> OfWeights:
    """roc_auc and pr_auc; see `probability_statistics`."""
    rows, classes = probabilities.shape
    if classes == 2:
        return OfWeights(("roc_auc", "pr_auc"), rows, _areas(probabilities[:, 1], labels == 1))
    by_class = [_areas(probabilities[:, k], labels == k) for k in range(classes)]

    def of_classes(weights: np.ndarray) -> np.ndarray:
        areas = np.stack([of_class(weights) for of_class in by_class], axis=2)  # [block, 2, classes]
        known = ~np.isnan(areas)
        with np.errstate(invalid="ignore"):
            means = np.where(known, areas, 0.0).sum(axis=2) / known.sum(axis=2)
        return np.hstack([means, areas.reshape(len(weights), -1)])

    per_class = (f"{kind}_class_{k}" for kind in ("roc_auc", "pr_auc") for k in range(classes))
    return OfWeights(("roc_auc", "pr_auc", *per_class), rows, of_classes)


def _areas(scores: np.ndarray, positive: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function of weights [block, rows]: both areas, [block, 2].

    Each positive row, from the highest score down, needs the weight of the positives so far and of the negatives above
    it; rows with the same score count as one place.
    """
    order = np.argsort(-scores, kind="stable")
    positives, negatives = order[positive[order]], order[~positive[order]]
    at, below_zero = -scores[positives], -scores[negatives]
    above = np.searchsorted(below_zero, at, side="left")  # negatives with a higher score than each positive
    through = np.searchsorted(below_zero, at, side="right")  # and with its own
    last = np.searchsorted(at, at, side="right") - 1  # the last positive of each one's score
    ties = bool((above != through).any() or (last != np.arange(len(at))).any())

    def of_weights(weights: np.ndarray) -> np.ndarray:
        exact = np.float64 if len(weights) == 1 else np.float32  # counts below 2^24 are exact in both
        hits = np.take(weights, positives, axis=1)
        misses = np.zeros((len(weights), len(negatives) + 1), exact)
        np.cumsum(np.take(weights, negatives, axis=1), axis=1, dtype=exact, out=misses[:, 1:])
        so_far = np.cumsum(hits, axis=1, dtype=exact)
        all_hits = hits.sum(axis=1, dtype=np.float64)
        all_misses = misses[:, -1].astype(np.float64)
        missed = half_missed = np.take(misses, through, axis=1)
        if ties:
            so_far = np.take(so_far, last, axis=1)
            half_missed = (missed + np.take(misses, above, axis=1)) / 2
        precision = so_far / np.maximum(so_far + missed, 1)
        wrongly_above = np.einsum("bp,bp->b", hits, half_missed, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            roc = 1 - wrongly_above / (all_hits * all_misses)
            average_precision = np.einsum("bp,bp->b", hits, precision, dtype=np.float64) / all_hits
        areas = np.stack([roc, average_precision], axis=1)
        areas[(all_hits == 0) | (all_misses == 0)] = np.nan
        return areas

    return of_weights
