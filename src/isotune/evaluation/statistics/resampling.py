"""The bootstrap over rows: exact in its draws, and fast enough that every metric has an interval.

A resample of n rows is a vector of weights, Multinomial(n, 1/n), and a statistic of it is a function of weighted rows
(Efron 1979). Most statistics here are functions of a few weighted sums, such as the counts of a confusion matrix, and
then all resamples of a block are one matrix product:

    weights [block, rows]  @  columns [rows, sums]  ->  sums [block, sums]  ->  statistics [block, names]

The weights depend on (seed, rows) alone and a resample on its number, so statistics of two models over the same rows
are paired.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from isotune.io.errors import UserError

RESAMPLES, LEVEL = 2_000, 0.95
CLASS_SUFFIX = "_class_"  # before the number of a class in the name of a statistic: f1_class_0


def without_class(name: str) -> str:
    """The kind of a statistic of one class, f1 of `f1_class_0` and of `f1[neg]`; of any other its name."""
    return name.split(CLASS_SUFFIX)[0].split("[")[0]


BLOCK_WEIGHTS, BLOCK_RESAMPLES = 2**21, 512  # fewer rows a block are slow to multiply, more leave the caches
_OPEN = 255  # a byte without an entry in the table
_SPARE_DEVIATIONS = 5.0  # the Poisson sum exceeds n once in three million resamples, which are drawn again
_LARGEST_POISSON = 40  # its probability is below 1e-48


@dataclass(frozen=True)
class OfSums:
    """Statistics that are a function of sums over rows."""

    names: tuple[str, ...]
    columns: np.ndarray  # float [rows, sums]; what each row adds to each sum
    # float64 [block, sums] -> float [block, names]; NaN where a statistic does not exist
    function: Callable[[np.ndarray], np.ndarray]
    # by name, of statistics that are a mean of values from 0 to 1: which columns add up to the values and which to
    # their number, at most one a row
    shares: Mapping[str, tuple[list[int], list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class OfWeights:
    """Statistics of any kind of so many rows."""

    names: tuple[str, ...]
    rows: int
    # uint8 weights [block, rows] -> float [block, names]; NaN where a statistic does not exist
    function: Callable[[np.ndarray], np.ndarray]


Statistic = OfSums | OfWeights


@dataclass(frozen=True)
class Scores:
    """Metrics and their 95% intervals by name."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    undefined: list[str] = field(default_factory=list)  # names of the metrics that these rows do not have
    # facts about the modules of `evaluate` among the metrics, for metrics.json
    modules: list[dict[str, Any]] = field(default_factory=list)

    def __or__(self, other: "Scores") -> "Scores":
        """The scores of both, over the same rows."""
        return Scores(
            self.metrics | other.metrics,
            self.intervals | other.intervals,
            sorted({*self.undefined, *other.undefined}),
            self.modules + other.modules,
        )


def select_names(statistics: Sequence[Statistic], only: Iterable[str] | None) -> set[str]:
    """The names of statistics that `only` has, in full or without their class; all where it is None or empty.

    UserError where it has a name that no statistic has.
    """
    kinds = {name: without_class(name) for statistic in statistics for name in statistic.names}
    selected = set(only or kinds)
    unknown = sorted(selected - kinds.keys() - set(kinds.values()))
    if unknown:
        known = ", ".join(sorted(set(kinds.values())))
        raise UserError(f"metrics: there is no {unknown[0]!r} here; there are {known}")
    return {name for name, kind in kinds.items() if name in selected or kind in selected}


def score(
    statistics: Sequence[Statistic],
    rows: int,
    *,
    only: Iterable[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Values and intervals of statistics over the same rows; of those that `only` selects, by `select_names`."""
    all_values = values(statistics)
    selected = select_names(statistics, only)
    metrics = {name: value for name, value in all_values.items() if name in selected and np.isfinite(value)}
    needed = [statistic for statistic in statistics if metrics.keys() & set(statistic.names)]
    intervals = bootstrap_intervals(needed, rows, resamples, seed)
    kept = {name: intervals[name] for name in metrics if name in intervals}
    return Scores(metrics, kept, sorted(selected - metrics.keys()))


def mean(name: str, values: np.ndarray) -> OfSums:
    """The mean of a value per row, [rows]."""
    return ratio(name, values, np.ones(len(values)))


def share(name: str, values: np.ndarray) -> OfSums:
    """The mean of a value from 0 to 1 per row, [rows]; where all are 0, or all 1, its interval is exact."""
    return replace(mean(name, values), shares={name: ([0], [1])})


def ratio(name: str, numerator: np.ndarray, denominator: np.ndarray) -> OfSums:
    """The sum of one value per row over the sum of another, [rows] each; NaN where the latter is 0."""

    def divide(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sums[:, 1:] != 0, sums[:, :1] / sums[:, 1:], np.nan)

    return OfSums((name,), np.column_stack([numerator, denominator]), divide)


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
    found: dict[str, float] = {}
    for statistic in statistics:
        if isinstance(statistic, OfSums):
            whole = statistic.columns.sum(axis=0, dtype=np.float64)
        else:
            whole = np.ones(statistic.rows, np.uint8)
        found.update(zip(statistic.names, statistic.function(whole[None])[0].tolist(), strict=True))
    return found


def bootstrap_intervals(
    statistics: Sequence[Statistic], rows: int, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Intervals of statistics over the same rows, by name: bias-corrected percentiles (Efron 1981).

    A percentile interval of a statistic that resampling biases, such as a calibration error, need not contain its
    value. So the percentiles are moved by twice the share of the resamples that lie below it, in standard deviations of
    a normal. An interval always contains the value. A share of rows (`OfSums.shares`) that is exactly 0 or 1 is so in
    every resample; its interval is the exact binomial one of Clopper and Pearson (1934).

    A resample in which a statistic is undefined (no row of a class was drawn) is left out; a statistic that is
    undefined in all of them has no interval. With 2,000 resamples the ends move by about 3% of the width from seed to
    seed.
    """
    from scipy.stats import binomtest

    all_values = values(statistics)
    intervals = {}
    for name, draws in bootstrap_draws(statistics, rows, resamples, seed).items():
        known = draws[np.isfinite(draws)]
        if len(known) and np.isfinite(all_values[name]):
            intervals[name] = _corrected(known, all_values[name], level)
    shares = [(s, *share) for s in statistics if isinstance(s, OfSums) for share in s.shares.items()]
    for statistic, name, (value_columns, count_columns) in shares:
        counts = statistic.columns[:, count_columns].sum(axis=1)
        total, most = statistic.columns[:, value_columns].sum(), counts.sum()
        trials = int((counts > 0).sum())  # a group of rows is one trial
        if trials and total in (0, most):
            exact = binomtest(trials if total else 0, trials).proportion_ci(level, method="exact")
            intervals[name] = (float(exact.low), float(exact.high))
    return intervals


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
    """Every statistic of every resample, by name: float64 [resamples]. Resample i has the same rows for all of them."""
    of_sums = [statistic for statistic in statistics if isinstance(statistic, OfSums)]
    of_weights = [statistic for statistic in statistics if isinstance(statistic, OfWeights)]
    columns = np.hstack([statistic.columns for statistic in of_sums] or [np.zeros((rows, 0))]).astype(np.float32)
    ends = np.cumsum([statistic.columns.shape[1] for statistic in of_sums])
    draws: dict[str, list[np.ndarray]] = {name: [] for statistic in statistics for name in statistic.names}
    for weights in draw_weights(rows, resamples, seed):
        # counts below 2^24 are exact in fp32 too
        sums = np.split((weights.astype(np.float32) @ columns).astype(np.float64), ends, axis=1)
        results = [statistic.function(own) for statistic, own in zip(of_sums, sums[:-1], strict=True)]
        results += [statistic.function(weights) for statistic in of_weights]
        for statistic, block in zip([*of_sums, *of_weights], results, strict=True):
            for name, column in zip(statistic.names, block.T, strict=True):
                draws[name].append(column)
    return {name: np.concatenate(blocks) for name, blocks in draws.items()}


def draw_weights(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row stands in each resample: blocks of uint8 [block, rows], every row of which sums to `rows`."""
    assert rows > 0 and resamples > 0
    block = max(1, min(BLOCK_RESAMPLES, BLOCK_WEIGHTS // rows))
    for number, start in enumerate(range(0, resamples, block)):
        generator = np.random.Generator(np.random.SFC64((seed, rows, number)))
        # a last, smaller block is the start of a whole one, so more resamples never change the first ones
        yield _draw_block(generator, block, rows)[: resamples - start]


def _draw_block(generator: np.random.Generator, block: int, rows: int) -> np.ndarray:
    # independent Poisson numbers are multinomial given their sum; the draws missing to `rows` are made one by one
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
    """Independent Poisson numbers, uint8 [block, rows], from random bytes by a table of 256 entries.

    The 1% of bytes without an entry are drawn from the rest of the distribution (the mixture method: Marsaglia 1963).
    """
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
    without_entry = np.flatnonzero(weights == _OPEN)
    rest = np.cumsum(shares - bytes_each)
    weights[without_entry] = np.searchsorted(rest, generator.random(len(without_entry)) * rest[-1], side="right")
    return weights.reshape(block, rows)
