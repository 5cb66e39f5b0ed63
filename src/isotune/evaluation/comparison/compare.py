"""Tests of the differences between runs on the same rows, for `eval/compare.py` and the report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from isotune.evaluation.comparison.paired_metrics import (
    DEFAULT_METRICS,
    LOWER_IS_BETTER,
    WITHOUT_DIRECTION,
    check_classes,
    correct_rows,
    row_scores,
    statistics_of,
)
from isotune.evaluation.comparison.pairing import choose_results, groups_of
from isotune.evaluation.results import Result
from isotune.evaluation.statistics.paired_tests import RESAMPLES, holm, mcnemar, paired_bootstrap, swap_test
from isotune.evaluation.statistics.resampling import OfSums, Statistic, by_group, values
from isotune.io.errors import UserError

LEVEL = 0.05
MCNEMAR, SWAP, BOOTSTRAP = "McNemar, exact", "swap test", "paired bootstrap"


@dataclass(frozen=True)
class MetricDifference:
    """B - A in one metric.

    Attributes:
        low, high: 95% interval of the difference, by paired bootstrap.
        test, p: the test and its p-value.
        mid_p: of McNemar's test.
        p_holm: p adjusted for all tests of the comparison.
        shown: p_holm is at most 0.05.
        better: "a" or "b" where a difference is shown and the metric has a better side.
    """

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    test: str
    p: float
    mid_p: float | None = None
    p_holm: float = 1.0
    shown: bool = False
    better: str | None = None


@dataclass(frozen=True)
class ChangedRow:
    """A row that one of two systems does better, with the prediction of each."""

    id: Any
    a: dict[str, Any]
    b: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two of the runs, by their index.

    Attributes:
        differences: one for each metric.
        only_b, only_a: number of rows that one side alone has right.
        right_means: the metric that is the share of correct rows.
        gained, lost: examples of rows that B does better and worse, the largest change first.
    """

    a: int
    b: int
    differences: list[MetricDifference]
    only_b: int
    only_a: int
    right_means: str
    gained: list[ChangedRow]
    lost: list[ChangedRow]

    @property
    def shown(self) -> list[MetricDifference]:
        """The significant differences."""
        return [difference for difference in self.differences if difference.shown]


@dataclass(frozen=True)
class Comparison:
    """Runs on the same rows; `tests` is the number of p-values that Holm's correction is for.

    `groups` is the number of groups of rows, None without any; groups are resampled and swapped as wholes.
    """

    runs: list[str]
    results: list[str]
    kind: str
    dataset_name: str
    dataset_split: str
    rows: int
    rows_sha256: str
    seed: int
    resamples: int
    tests: int
    groups: int | None = None
    pairs: list[Pair] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "level": LEVEL, "difference_shown": any(pair.shown for pair in self.pairs)}


def compare_runs(
    runs: Sequence[str | Path],
    *,
    name: str | None = None,
    metrics: Sequence[str] = (),
    all_pairs: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    examples: int = 3,
) -> Comparison:
    """Compare runs on an evaluation that they have in common, each with the first one.

    Args:
        runs: run folders, or folders of results.
        name: of the evaluation, where there are several.
        metrics: to test; by default a few of each kind of evaluation.
        all_pairs: compare each with each.
        resamples: of the bootstrap and of the swap test.
        examples: number of rows to show for each direction.

    Raises:
        UserError: fewer than two runs, no result in common, different rows, or a metric that they do not have.
    """
    if len(runs) < 2:
        raise UserError("a comparison needs two runs or more")
    for option, number, least in (("--resamples", resamples, 100), ("--examples", examples, 0), ("--seed", seed, 0)):
        if number < least:
            raise UserError(f"{option} is {number}: it is at least {least}")
    results = choose_results(runs, name)
    check_classes(results)
    groups = groups_of(results)
    statistics = [_grouped(statistics_of(result), groups) for result in results]
    chosen = _choose_metrics(results, statistics, metrics)
    indices = list(combinations(range(len(runs)), 2)) if all_pairs else [(0, b) for b in range(1, len(runs))]
    pairs = []
    for a, b in indices:
        changed = _ChangedRows(results[a], results[b])
        differences = _differences(statistics[a], statistics[b], chosen, changed, resamples, seed, groups)
        pairs.append(Pair(a, b, differences, *changed.counts(), *changed.examples(examples)))
    facts = results[0].facts
    return Comparison(
        runs=[str(run) for run in runs],
        results=[str(result.folder) for result in results],
        kind=facts["kind"],
        dataset_name=facts["dataset_name"],
        dataset_split=facts["dataset_split"],
        rows=len(results[0].predictions),
        rows_sha256=facts["rows_sha256"],
        seed=seed,
        resamples=resamples,
        tests=sum(len(pair.differences) for pair in pairs),
        groups=None if groups is None else int(groups.max()) + 1,
        pairs=_corrected(pairs),
    )


def _grouped(statistics: dict[str, Statistic], groups: np.ndarray | None) -> dict[str, Statistic]:
    """The statistics over groups of rows, where there are groups; names of one statistic still share it."""
    if groups is None:
        return statistics
    grouped = {id(statistic): by_group(statistic, groups) for statistic in statistics.values()}
    return {name: grouped[id(statistic)] for name, statistic in statistics.items()}


class _ChangedRows:
    """The rows that only one side has right, and the change of each row's score from A to B."""

    def __init__(self, a: Result, b: Result) -> None:
        self.a, self.b = a.predictions, b.predictions
        self.right_means, correct_a = correct_rows(a)
        _, correct_b = correct_rows(b)
        self.only_a, self.only_b = correct_a & ~correct_b, correct_b & ~correct_a
        self.gain = row_scores(b) - row_scores(a)

    def counts(self) -> tuple[int, int, str]:
        return int(self.only_b.sum()), int(self.only_a.sum()), self.right_means

    def examples(self, count: int) -> tuple[list[ChangedRow], list[ChangedRow]]:
        """Rows that B gained and lost; where correctness is the same, those whose score changed most."""
        differ = bool((self.only_a | self.only_b).any())
        gained = self.only_b if differ else self.gain > 0
        lost = self.only_a if differ else self.gain < 0
        return self._largest(gained, -self.gain, count), self._largest(lost, self.gain, count)

    def _largest(self, mask: np.ndarray, order: np.ndarray, count: int) -> list[ChangedRow]:
        rows = np.flatnonzero(mask)
        first = rows[np.argsort(order[rows], kind="stable")][:count].tolist()
        return [ChangedRow(self.a[row]["id"], self.a[row], self.b[row]) for row in first]


def _choose_metrics(
    results: Sequence[Result], statistics: Sequence[dict[str, Statistic]], names: Sequence[str]
) -> list[str]:
    common = [name for name in statistics[0] if all(name in other for other in statistics)]
    for name in names:
        if name not in common:
            raise UserError(f"--metrics: {name!r} is not a metric of all these results; there are {', '.join(common)}")
    return list(dict.fromkeys(names)) or [name for name in DEFAULT_METRICS[results[0].facts["kind"]] if name in common]


def _differences(
    a: dict[str, Statistic],
    b: dict[str, Statistic],
    metrics: Sequence[str],
    changed: _ChangedRows,
    resamples: int,
    seed: int,
    groups: np.ndarray | None,
) -> list[MetricDifference]:
    """The difference of every metric that both sides have. McNemar's test is for independent rows only."""
    needed = list({id(a[name]): name for name in metrics}.values())
    units = len(changed.gain) if groups is None else int(groups.max()) + 1
    intervals = paired_bootstrap([a[n] for n in needed], [b[n] for n in needed], units, seed=seed, resamples=resamples)
    values_a, values_b = (values([side[name] for name in needed]) for side in (a, b))
    swapped: dict[str, float] = {}
    differences = []
    for name in metrics:
        value_a, value_b = values_a[name], values_b[name]
        if name not in intervals or not np.isfinite(value_b - value_a):
            continue
        low, high, p = intervals[name].low, intervals[name].high, intervals[name].p
        test, mid_p, (one, other) = BOOTSTRAP, None, (a[name], b[name])
        if name == changed.right_means and groups is None:
            exact = mcnemar(int(changed.only_a.sum()), int(changed.only_b.sum()))
            test, p, mid_p = MCNEMAR, exact.p, exact.mid_p
        elif isinstance(one, OfSums) and isinstance(other, OfSums):
            if name not in swapped:
                swapped |= swap_test(one, other, seed=seed, resamples=resamples)
            test, p = SWAP, swapped[name]
        differences.append(MetricDifference(name, value_a, value_b, value_b - value_a, low, high, test, p, mid_p))
    return differences


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with p_holm over all of their tests, `shown` and `better`."""
    adjusted = iter(holm([difference.p for pair in pairs for difference in pair.differences]))
    corrected = []
    for pair in pairs:
        differences = []
        for difference in pair.differences:
            p_holm = next(adjusted)
            shown = p_holm <= LEVEL
            better = None
            if shown and difference.metric not in WITHOUT_DIRECTION:
                better = "b" if (difference.difference < 0) == (difference.metric in LOWER_IS_BETTER) else "a"
            differences.append(replace(difference, p_holm=p_holm, shown=shown, better=better))
        corrected.append(replace(pair, differences=differences))
    return corrected
