"""Whether runs differ on the same rows, beyond chance: what `eval/compare.py` and the report say of several runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from isotune.evaluation.metrics.paired_metrics import (
    COMPARED,
    LOWER_IS_BETTER,
    NO_BETTER_SIDE,
    check_classes,
    right_rows,
    row_scores,
    statistics_of,
)
from isotune.evaluation.results import Result
from isotune.evaluation.statistics.paired_tests import RESAMPLES, holm, mcnemar, paired_bootstrap, swap_test
from isotune.evaluation.statistics.pairing import choose_results, groups_of
from isotune.evaluation.statistics.resampling import OfSums, Statistic, by_group, values
from isotune.io.errors import UserError

LEVEL = 0.05
MCNEMAR, SWAP, BOOTSTRAP = "McNemar, exact", "swap test", "paired bootstrap"


@dataclass(frozen=True)
class MetricDifference:
    """B - A in one metric.

    Attributes:
        low, high: 95% interval of the difference, by paired bootstrap.
        test, p: which test gave p.
        mid_p: of McNemar's test.
        p_holm: p adjusted for all tests of the comparison.
        shown: p_holm is at most 0.05: the difference is more than chance explains.
        better: "a" or "b" where a difference is shown and one side is better.
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
    """A row that one of two systems does better, with what each said of it."""

    id: Any
    a: dict[str, Any]
    b: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two of the runs, by their number.

    Attributes:
        differences: metric by metric.
        only_b, only_a: how many rows one side alone has right.
        right_means: the metric that counts rows that are right.
        gained, lost: examples of rows that B does better and worse, the clearest first.
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
        """The differences that are more than chance explains."""
        return [one for one in self.differences if one.shown]


@dataclass(frozen=True)
class Comparison:
    """Runs on the same rows; `tests` is how many p-values Holm's correction is for.

    `groups` is how many groups the rows are of, where some have several: these are resampled and swapped as wholes.
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
    """Compare runs on the rows of an evaluation that they have in common, each with the first one.

    Args:
        runs: run folders, or folders of results.
        name: of the evaluation, where there are several.
        metrics: to test; else a few of each kind of evaluation.
        all_pairs: compare each with each.
        resamples: of the bootstrap and of the swap test.
        examples: rows to show each way.

    Raises:
        UserError: fewer than two runs, no result in common, other rows, or a metric that they do not have.
    """
    if len(runs) < 2:
        raise UserError("a comparison needs two runs or more")
    for option, number, least in (("--resamples", resamples, 100), ("--examples", examples, 0), ("--seed", seed, 0)):
        if number < least:
            raise UserError(f"{option} is {number}: it takes at least {least}")
    results = choose_results(runs, name)
    check_classes(results)
    groups = groups_of(results)
    statistics = [_grouped(statistics_of(result), groups) for result in results]
    chosen = _choose_metrics(results, statistics, metrics)
    numbers = list(combinations(range(len(runs)), 2)) if all_pairs else [(0, b) for b in range(1, len(runs))]
    pairs = []
    for a, b in numbers:
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
    made = {id(one): by_group(one, groups) for one in statistics.values()}
    return {name: made[id(one)] for name, one in statistics.items()}


class _ChangedRows:
    """Which rows B has right and A has not, which the other way round, and how clear each change is."""

    def __init__(self, a: Result, b: Result) -> None:
        self.a, self.b = a.predictions, b.predictions
        self.right_means, right_a = right_rows(a)
        _, right_b = right_rows(b)
        self.only_a, self.only_b = right_a & ~right_b, right_b & ~right_a
        self.gain = row_scores(b) - row_scores(a)

    def counts(self) -> tuple[int, int, str]:
        return int(self.only_b.sum()), int(self.only_a.sum()), self.right_means

    def examples(self, count: int) -> tuple[list[ChangedRow], list[ChangedRow]]:
        """Rows that B gained and lost; where none turned right or wrong, those whose score moved most."""
        turned = bool((self.only_a | self.only_b).any())
        gained = self.only_b if turned else self.gain > 0
        lost = self.only_a if turned else self.gain < 0
        return self._clearest(gained, -self.gain, count), self._clearest(lost, self.gain, count)

    def _clearest(self, among: np.ndarray, order: np.ndarray, count: int) -> list[ChangedRow]:
        places = np.flatnonzero(among)
        chosen = places[np.argsort(order[places], kind="stable")][:count].tolist()
        return [ChangedRow(self.a[i]["id"], self.a[i], self.b[i]) for i in chosen]


def _choose_metrics(
    results: Sequence[Result], statistics: Sequence[dict[str, Statistic]], asked: Sequence[str]
) -> list[str]:
    common = [name for name in statistics[0] if all(name in other for other in statistics)]
    for name in asked:
        if name not in common:
            raise UserError(f"--metrics: {name!r} is no metric of all these results; there are {', '.join(common)}")
    return list(dict.fromkeys(asked)) or [name for name in COMPARED[results[0].facts["kind"]] if name in common]


def _differences(
    a: dict[str, Statistic],
    b: dict[str, Statistic],
    metrics: Sequence[str],
    changed: _ChangedRows,
    resamples: int,
    seed: int,
    groups: np.ndarray | None,
) -> list[MetricDifference]:
    """Every metric that both sides have a value of. McNemar's test is for rows that are independent of each other."""
    needed = list({id(a[name]): name for name in metrics}.values())
    witnesses = len(changed.gain) if groups is None else int(groups.max()) + 1
    intervals = paired_bootstrap(
        [a[n] for n in needed], [b[n] for n in needed], witnesses, seed=seed, resamples=resamples
    )
    values_a, values_b = (values([of[name] for name in needed]) for of in (a, b))
    swapped: dict[str, float] = {}
    found = []
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
        found.append(MetricDifference(name, value_a, value_b, value_b - value_a, low, high, test, p, mid_p))
    return found


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with p_holm over all of their tests, and what follows from it."""
    adjusted = iter(holm([one.p for pair in pairs for one in pair.differences]))
    done = []
    for pair in pairs:
        differences = []
        for one in pair.differences:
            p_holm = next(adjusted)
            shown = p_holm <= LEVEL
            better = None
            if shown and one.metric not in NO_BETTER_SIDE:
                better = "b" if (one.difference < 0) == (one.metric in LOWER_IS_BETTER) else "a"
            differences.append(replace(one, p_holm=p_holm, shown=shown, better=better))
        done.append(replace(pair, differences=differences))
    return done
