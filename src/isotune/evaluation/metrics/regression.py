"""The metrics of a regression, each as a statistic of weighted rows, so that one code gives value and interval."""

import numpy as np

from isotune.evaluation.statistics.resampling import OfSums, OfWeights, Statistic, mean

REGRESSION_METRICS = ("pearson", "spearman", "mean_squared_error", "mean_absolute_error", "r2")


def regression_statistics(labels: np.ndarray, predictions: np.ndarray) -> list[Statistic]:
    """All statistics of labels and predictions, float64 [rows] each.

    A correlation is undefined where all numbers of one side are equal, and r2 where all labels are.
    """
    errors = predictions - labels
    # both sides around the labels' mean and in units of their spread: resamples sum them in fp32
    unit = labels.std() if np.ptp(labels) > 0 else 1.0
    y, p = ((values - labels.mean()) / unit for values in (labels, predictions))
    moments = np.column_stack([np.ones(len(y)), y, p, y * y, p * p, y * p])
    return [
        OfSums(("pearson",), moments, _pearson),
        OfWeights(("spearman",), len(y), _spearman(labels, predictions)),
        mean("mean_squared_error", errors**2),
        mean("mean_absolute_error", np.abs(errors)),
        OfSums(("r2",), np.column_stack([np.ones(len(y)), y, y * y, (p - y) ** 2]), _r2),
    ]


def _pearson(sums: np.ndarray) -> np.ndarray:
    """[block, 6] sums of 1, y, p, y^2, p^2, y p -> [block, 1]."""
    n, y, p, yy, pp, yp = sums.T
    return _correlation(yp - y * p / n, yy - y * y / n, pp - p * p / n, (yy, pp))[:, None]


def _r2(sums: np.ndarray) -> np.ndarray:
    """[block, 4] sums of 1, y, y^2, (p - y)^2 -> [block, 1]."""
    n, y, yy, errors = sums.T
    spread = yy - y * y / n
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > _nothing(yy), 1 - errors / spread, np.nan)[:, None]


def _correlation(
    both: np.ndarray, one: np.ndarray, other: np.ndarray, sizes: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    defined = (one > _nothing(sizes[0])) & (other > _nothing(sizes[1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(defined, np.clip(both / np.sqrt(one * other), -1, 1), np.nan)


def _nothing(size: np.ndarray) -> np.ndarray:
    """What a sum of squares that is zero on paper may be, beside the sum that it was computed from."""
    return 1e-6 * np.maximum(size, 1e-6)


def _spearman(labels: np.ndarray, predictions: np.ndarray):
    """A function of weights [block, rows]: Pearson's correlation of the ranks that the repeated rows would have."""
    sides = [_ranks(values) for values in (labels, predictions)]

    def of_weights(weights: np.ndarray) -> np.ndarray:
        counts = weights.astype(np.float64)
        middle = (counts.sum(axis=1, keepdims=True) + 1) / 2  # the mean of all ranks
        y, p = (ranks(counts) - middle for ranks in sides)
        yy, pp, yp = ((counts * product).sum(axis=1) for product in (y * y, p * p, y * p))
        return _correlation(yp, yy, pp, (middle[:, 0] ** 2, middle[:, 0] ** 2))[:, None]

    return of_weights


def _ranks(values: np.ndarray):
    """A function of weights [block, rows]: the rank of each row among the repeated ones; equal values share a mean."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))

    def of_weights(counts: np.ndarray) -> np.ndarray:
        sizes = np.add.reduceat(counts[:, order], starts, axis=1)
        below = np.cumsum(sizes, axis=1) - sizes
        return (below + (sizes + 1) / 2)[:, group]

    return of_weights
