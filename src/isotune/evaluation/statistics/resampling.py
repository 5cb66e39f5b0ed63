"""No number without its uncertainty: the bootstrap over rows, exact in its draws and fast enough to be always on.

A resample of n rows is n draws with replacement, so it is a vector of weights, Multinomial(n, 1/n), and a statistic of
it is a function of weighted rows (Efron 1979). Most statistics here are functions of a few weighted sums, such as the
counts of a confusion matrix, and then all resamples of a block are one matrix product:

    weights [block, rows]  @  columns [rows, sums]  ->  sums [block, sums]  ->  statistics [block, names]

The weights are exact and cost about a nanosecond each. Independent Poisson numbers with a mean a little below 1 are, on
condition of their sum, multinomial; the few draws that are missing to n are made one by one. The Poisson numbers come
from random bytes by a table of 256 entries, and the 1% of bytes that the table leaves open are drawn from what remains
of the distribution (the mixture method: Marsaglia 1963).

The weights depend on (seed, rows) alone and a resample on its number, so statistics of two models over the same rows
are paired by themselves.

Rows that are all right, or all wrong, give the same share in every resample, as if it were known for certain. There
the interval is the exact one of Clopper and Pearson (1934).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import ndtr, ndtri

RESAMPLES, LEVEL = 2_000, 0.95
BLOCK_WEIGHTS, BLOCK_RESAMPLES = 2**21, 512  # fewer rows a block are slow to multiply, more leave the caches
_OPEN = 255  # a byte for which the table has no answer
_SPARE_DEVIATIONS = 5.0  # the Poisson sum exceeds n once in three million resamples, which are drawn again
_LARGEST_POISSON = 40  # its probability is below 1e-48


@dataclass(frozen=True)
class OfSums:
    """Statistics that are a function of sums over rows.

    Attributes:
        names: of the statistics.
        columns: float [rows, sums]; what each row adds to each sum.
        function: float64 [block, sums] -> float [block, names]; NaN where a statistic does not exist.
        shares: by name, of statistics that are a mean of values from 0 to 1: which columns add up to the values and
            which to their number, at most one a row.
    """

    names: tuple[str, ...]
    columns: np.ndarray
    function: Callable[[np.ndarray], np.ndarray]
    shares: Mapping[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    def value(self) -> np.ndarray:
        """The statistics of the rows themselves: float64 [names]."""
        return self.function(self.columns.sum(axis=0, dtype=np.float64)[None])[0]


@dataclass(frozen=True)
class OfWeights:
    """Statistics of any kind.

    Attributes:
        names: of the statistics.
        rows: how many there are.
        function: uint8 weights [block, rows] -> float [block, names]; NaN where a statistic does not exist.
    """

    names: tuple[str, ...]
    rows: int
    function: Callable[[np.ndarray], np.ndarray]

    def value(self) -> np.ndarray:
        """The statistics of the rows themselves: float64 [names]."""
        return self.function(np.ones((1, self.rows), np.uint8))[0]


Statistic = OfSums | OfWeights


def mean(name: str, values: np.ndarray) -> OfSums:
    """The mean of a value per row, [rows]."""
    return ratio(name, values, np.ones(len(values)))


def share(name: str, values: np.ndarray) -> OfSums:
    """The mean of a value from 0 to 1 per row, [rows]; where all are 0, or all 1, its interval is exact."""
    return replace(mean(name, values), shares={name: ([0], [1])})


def ratio(name: str, numerator: np.ndarray, denominator: np.ndarray) -> OfSums:
    """The sum of one value per row over the sum of another, [rows] each; NaN where the latter is 0."""
    return OfSums((name,), np.column_stack([numerator, denominator]), _divide)


def by_group(statistic: Statistic, groups: np.ndarray) -> Statistic:
    """A statistic of rows as one of groups of rows, which are then resampled as wholes; groups: int [rows], from 0."""
    count = int(groups.max()) + 1
    if isinstance(statistic, OfWeights):
        of_rows = statistic.function
        return OfWeights(statistic.names, count, lambda weights: of_rows(weights[:, groups]))
    summed = np.zeros((count, statistic.columns.shape[1]))
    np.add.at(summed, groups, statistic.columns)
    return replace(statistic, columns=summed)


def values(statistics: Sequence[Statistic]) -> dict[str, float]:
    """Every statistic of the rows themselves, by name; NaN where it does not exist."""
    return {
        name: float(value) for one in statistics for name, value in zip(one.names, one.value().tolist(), strict=True)
    }


def bootstrap_intervals(
    statistics: Sequence[Statistic],
    rows: int,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, tuple[float, float]]:
    """Intervals of statistics, by name: bias-corrected percentiles (Efron 1981).

    A percentile interval of a statistic that resampling pushes to one side, such as a calibration error, need not even
    hold its value. So the percentiles are moved by twice the share of the resamples that lie below it, in standard
    deviations of a normal; where that share is a half they stay. An interval always holds the value.

    A share of rows (`OfSums.shares`) that is exactly 0 or 1 has the exact binomial interval instead. For values between
    0 and 1 that are all 0, or all 1, it is on the safe side: their mean is at most the share of those that are not 0.

    A statistic that does not exist in a resample (no row of a class was drawn) is judged by the others; one that
    exists in none has no interval.

    Args:
        statistics: over the same rows, in the same order.
        rows: how many there are.
        resamples: more make the ends steadier: with 2,000 they move by about 3% of the width from seed to seed.
        seed: the same one gives the same intervals.
        level: the share of such intervals that hold the truth, where rows are many.
    """
    found = values(statistics)
    intervals = {}
    for name, draws in bootstrap_draws(statistics, rows, resamples, seed).items():
        known = draws[np.isfinite(draws)]
        if len(known) and np.isfinite(found[name]):
            intervals[name] = _corrected(known, found[name], level)
    for one in statistics:
        if isinstance(one, OfSums):
            intervals |= _of_certain_shares(one, level)
    return intervals


def _of_certain_shares(one: OfSums, level: float) -> dict[str, tuple[float, float]]:
    """Exact intervals of the shares that are 0 or 1, by name."""
    from scipy.stats import binomtest

    found = {}
    for name, (of_values, of_number) in one.shares.items():
        number = one.columns[:, of_number].sum(axis=1)
        total, most = one.columns[:, of_values].sum(), number.sum()
        trials = int((number > 0).sum())  # of rows that stand for several, each is one witness
        if trials and total in (0, most):
            exact = binomtest(trials if total else 0, trials).proportion_ci(level, method="exact")
            found[name] = (float(exact.low), float(exact.high))
    return found


def _corrected(draws: np.ndarray, value: float, level: float) -> tuple[float, float]:
    near = 1e-6 * max(abs(value), 1e-6)  # sums in fp32 and in fp64 differ by so much at most
    below = ((draws < value - near).mean() + (draws <= value + near).mean()) / 2
    shift = 2 * ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    ends = ndtr(shift + ndtri([(1 - level) / 2, (1 + level) / 2]))
    low, high = np.quantile(draws, ends).tolist()
    return min(low, value), max(high, value)


def bootstrap_draws(
    statistics: Sequence[Statistic], rows: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every statistic of every resample, by name: float64 [resamples]. Resample i has the same rows for all of them.

    Two runs over the same rows are compared by subtracting the draws of one from those of the other.
    """
    of_sums = [one for one in statistics if isinstance(one, OfSums)]
    of_weights = [one for one in statistics if isinstance(one, OfWeights)]
    columns = np.hstack([one.columns for one in of_sums] or [np.zeros((rows, 0))]).astype(np.float32)
    widths = [one.columns.shape[1] for one in of_sums]
    parts: dict[str, list[np.ndarray]] = {name: [] for one in statistics for name in one.names}
    for weights in draw_weights(rows, resamples, seed):
        summed = np.split(_sums(weights, columns), np.cumsum(widths), axis=1)
        found = [one.function(sums) for one, sums in zip(of_sums, summed[:-1], strict=True)]
        found += [one.function(weights) for one in of_weights]
        for one, draws in zip([*of_sums, *of_weights], found, strict=True):
            for place, name in enumerate(one.names):
                parts[name].append(draws[:, place])
    return {name: np.concatenate(blocks) for name, blocks in parts.items()}


def resampled_sums(columns: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """The sums of every resample, float64 [resamples, sums], of what each row adds to them, [rows, sums]."""
    blocks = draw_weights(len(columns), resamples, seed)
    return np.concatenate([_sums(weights, columns.astype(np.float64, copy=False)) for weights in blocks])


def draw_weights(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row stands in each resample: blocks of uint8 [block, rows], every row of which sums to `rows`."""
    assert rows > 0 and resamples > 0
    block = max(1, min(BLOCK_RESAMPLES, BLOCK_WEIGHTS // rows))
    for number, start in enumerate(range(0, resamples, block)):
        generator = np.random.Generator(np.random.SFC64((seed, rows, number)))
        # a last, smaller block is the beginning of a whole one: more resamples never change the first
        yield _draw_block(generator, block, rows)[: resamples - start]


def _draw_block(generator: np.random.Generator, block: int, rows: int) -> np.ndarray:
    rate = max(0.0, 1 - _SPARE_DEVIATIONS / rows**0.5)
    weights = _poisson(generator, rate, block, rows)
    missing = rows - weights.sum(axis=1, dtype=np.int64)
    while (beyond := np.flatnonzero(missing < 0)).size:
        weights[beyond] = _poisson(generator, rate, len(beyond), rows)
        missing[beyond] = rows - weights[beyond].sum(axis=1, dtype=np.int64)
    drawn = generator.integers(0, rows, int(missing.sum()))
    np.add.at(weights.reshape(-1), np.repeat(np.arange(block) * rows, missing) + drawn, np.uint8(1))
    return weights


def _poisson(generator: np.random.Generator, rate: float, block: int, rows: int) -> np.ndarray:
    """Independent Poisson numbers: uint8 [block, rows]."""
    if rate == 0.0:
        return np.zeros((block, rows), np.uint8)
    numbers = np.arange(_LARGEST_POISSON)
    shares = 256 * np.exp(numbers * np.log(rate) - rate - np.cumsum(np.log(np.maximum(numbers, 1))))
    bytes_each = np.floor(shares).astype(int)
    table = np.full(256, _OPEN, np.uint8)
    table[: bytes_each.sum()] = np.repeat(numbers, bytes_each)
    count = block * rows
    random = generator.integers(0, 2**64, -(-count // 8), np.uint64).tobytes()
    weights = np.frombuffer(bytearray(random.translate(table.tobytes())), np.uint8)[:count]
    still_open = np.flatnonzero(weights == _OPEN)
    rest = np.cumsum(shares - bytes_each)
    weights[still_open] = np.searchsorted(rest, generator.random(len(still_open)) * rest[-1], side="right")
    return weights.reshape(block, rows)


def _sums(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Weighted sums in the type of `columns`, given as float64; counts below 2^24 are exact in fp32 too."""
    return (weights.astype(columns.dtype) @ columns).astype(np.float64, copy=False)


def _divide(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1:] != 0, sums[:, :1] / sums[:, 1:], np.nan)
