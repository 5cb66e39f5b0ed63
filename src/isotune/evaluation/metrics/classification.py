"""The metrics of a classification, each as a statistic of weighted rows, so that one code gives value and interval.

Those of predicted classes, log loss, Brier score and calibration error are functions of sums over rows; the areas under
the ROC and the precision-recall curve need the order of all rows, so they are functions of the resamples' weights. A
class that is neither among the labels nor among the predictions is left out of the means, as in scikit-learn. A
precision or recall of 0 / 0 is undefined, as nothing was observed; in the means it counts as 0 where the class is on
the other side.
"""

from collections.abc import Callable, Sequence

import numpy as np

from isotune.evaluation.statistics.resampling import CLASS_SUFFIX, OfSums, OfWeights, Statistic, mean, share

KINDS = ("precision", "recall", "f1")
AVERAGES = ("macro", "micro", "weighted")
METRICS = (
    "accuracy", *KINDS, *(f"{kind}_{average}" for kind in KINDS for average in AVERAGES),
    "log_loss", "brier", "expected_calibration_error", "roc_auc", "pr_auc", "mean_absolute_error", "quadratic_kappa",
)  # fmt: skip
BINS = 15  # of the calibration error, as in Guo et al. 2017, arXiv:1706.04599
SMALLEST = np.finfo(np.float64).eps  # smaller probabilities are clipped, because the log of 0 is infinite


def classification_statistics(
    labels: np.ndarray, probabilities: np.ndarray, *, ordinal: bool = False, names: Sequence[str] | None = None
) -> list[Statistic]:
    """All statistics of labels, integer [rows], and probabilities, float64 [rows, classes].

    The prediction of a row is its likeliest class, the lowest of equally likely ones. `ordinal` adds the metrics of
    ordered classes. `names` are those of the classes, by which the metrics of one class are called.
    """
    predictions = probabilities.argmax(axis=1)
    of_class = class_suffixes(probabilities.shape[1], names)
    return [
        *label_statistics(labels, predictions, of_class),
        *probability_statistics(labels, probabilities, of_class),
        *(ordinal_statistics(labels, predictions) if ordinal else []),
    ]


def class_suffixes(classes: int, names: Sequence[str] | None = None) -> list[str]:
    """What follows the name of a metric of each class: `[NAME]`, or `_class_k` where the classes have no names."""
    return [f"[{name}]" for name in names] if names else [f"{CLASS_SUFFIX}{k}" for k in range(classes)]


def label_statistics(labels: np.ndarray, predictions: np.ndarray, of_class: Sequence[str]) -> list[Statistic]:
    """accuracy; precision, recall and F1 in macro, micro and weighted mean, and of each class by its suffix."""
    classes = len(of_class)
    numbers = np.arange(classes)
    is_label, is_prediction = labels[:, None] == numbers, predictions[:, None] == numbers
    columns = np.hstack([is_label & is_prediction, is_label, is_prediction]).astype(np.float64)
    per_class = [kind + suffix for kind in KINDS for suffix in of_class]
    means = [f"{kind}_{average}" for kind in KINDS for average in AVERAGES]
    hits, of_label, of_prediction = ([start + k for k in range(classes)] for start in (0, classes, 2 * classes))
    shares = dict.fromkeys(["accuracy", *(f"{kind}_micro" for kind in KINDS)], (hits, of_label))
    shares |= {f"precision{suffix}": ([hits[k]], [of_prediction[k]]) for k, suffix in enumerate(of_class)}
    shares |= {f"recall{suffix}": ([hits[k]], [of_label[k]]) for k, suffix in enumerate(of_class)}
    return [OfSums(("accuracy", *means, *per_class), columns, _from_counts, shares)]


def ordinal_statistics(labels: np.ndarray, predictions: np.ndarray) -> list[Statistic]:
    """mean_absolute_error, in classes; quadratic_kappa (Cohen 1968), undefined where chance gives no error."""
    y, p = labels.astype(np.float64), predictions.astype(np.float64)
    columns = np.column_stack([np.ones(len(y)), y, y**2, p, p**2, (y - p) ** 2])
    return [mean("mean_absolute_error", np.abs(y - p)), OfSums(("quadratic_kappa",), columns, _kappa)]


def class_scores(hits: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Precision, recall and F1 of counts [block, K]: [block, 3, K]; 0 where there is nothing to divide by."""
    precision, recall, half_f1 = (
        np.divide(hits, whole, out=np.zeros_like(hits), where=whole > 0)
        for whole in (predictions, labels, labels + predictions)
    )
    return np.stack([precision, recall, 2 * half_f1], axis=1)


def observed(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Whether there is something to divide by, bool [block, 3, K]."""
    return np.stack([predictions > 0, labels > 0, labels + predictions > 0], axis=1)


def _from_counts(sums: np.ndarray) -> np.ndarray:
    """[block, 3 K] counts of hits, labels and predictions of each class -> [block, 1 + 9 + 3 K] statistics."""
    hits, labels, predictions = np.split(sums, 3, axis=1)
    present = labels + predictions > 0
    known = class_scores(hits, labels, predictions)
    scores = np.where(observed(labels, predictions), known, np.nan)
    rows = labels.sum(axis=1)
    accuracy = hits.sum(axis=1) / rows
    macro = known.sum(axis=2) / present.sum(axis=1)[:, None]
    weighted = (known * labels[:, None]).sum(axis=2) / rows[:, None]
    micro = np.repeat(accuracy[:, None], len(KINDS), axis=1)
    means = np.stack([macro, micro, weighted], axis=2).reshape(len(sums), -1)
    return np.hstack([accuracy[:, None], means, scores.reshape(len(sums), -1)])


def _kappa(sums: np.ndarray) -> np.ndarray:
    """1 - (observed squared distance) / (squared distance of the same two columns in independent order)."""
    rows, y, y2, p, p2, observed = sums.T
    by_chance = y2 + p2 - 2 * y * p / rows
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(by_chance > 0, 1 - observed / by_chance, np.nan)[:, None]


def probability_statistics(labels: np.ndarray, probabilities: np.ndarray, of_class: Sequence[str]) -> list[Statistic]:
    """log_loss in nats; brier; expected_calibration_error; roc_auc and pr_auc.

    brier is the squared distance of all probabilities from the label, halved for two classes (Brier 1950, and as in
    scikit-learn). expected_calibration_error is over BINS bins of equal width of the highest probability. roc_auc (ties
    count half) and pr_auc (average precision) are of class 1 for two classes; for more, those with a suffix are of one
    class against the others, and the name without a suffix is the mean over the classes for which it is defined. They
    are undefined where all rows are of one class.
    """
    rows, classes = probabilities.shape
    truth = labels[:, None] == np.arange(classes)
    squared = ((probabilities - truth) ** 2).sum(axis=1)
    true_probability = np.clip(probabilities[np.arange(rows), labels], SMALLEST, 1 - SMALLEST)
    return [
        mean("log_loss", -np.log(true_probability)),
        share("brier", squared / 2) if classes == 2 else mean("brier", squared),
        calibration_error(labels, probabilities),
        _ranking(labels, probabilities, of_class),
    ]


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> OfSums:
    """expected_calibration_error: the mean distance between confidence and accuracy over the bins."""
    confidence, correct = confidences(labels, probabilities)
    columns = np.zeros((len(labels), BINS + 1))
    columns[:, BINS] = 1
    columns[np.arange(len(labels)), bin_of(confidence)] = confidence - correct

    def error(sums: np.ndarray) -> np.ndarray:
        return np.abs(sums[:, :BINS]).sum(axis=1, keepdims=True) / sums[:, BINS:]

    return OfSums(("expected_calibration_error",), columns, error)


def confidences(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest probability of each row, float64 [rows], and whether its class is the label, bool [rows]."""
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, integer [rows] from 0 to BINS - 1; a bin includes its upper edge."""
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def _ranking(labels: np.ndarray, probabilities: np.ndarray, of_class: Sequence[str]) -> OfWeights:
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

    per_class = (kind + suffix for kind in ("roc_auc", "pr_auc") for suffix in of_class)
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
