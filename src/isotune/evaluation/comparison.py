"""Tests of the differences between runs on the same rows, for `eval/compare.py` and the report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from isotune.evaluation.paired_results import MeasuredRows, choose_results, groups_of, measure_rows
from isotune.evaluation.results import CLASSIFICATION, GENERATION, Result
from isotune.evaluation.statistics.paired_tests import RESAMPLES, holm, mcnemar, paired_bootstrap, swap_test
from isotune.evaluation.statistics.resampling import OfSums, values
from isotune.io.errors import UserError

LEVEL = 0.05
MCNEMAR, SWAP, BOOTSTRAP = "McNemar, exact", "swap test", "paired bootstrap"
# The default metrics of a comparison: few, because every further test weakens all others.
DEFAULT_METRICS = {
    CLASSIFICATION: (
        *("accuracy", "f1_macro", "log_loss", "brier"),
        *("exact_match", "pearson", "spearman", "mean_squared_error"),  # of several labels, and of numbers
    ),
    GENERATION: ("exact_match", "rougeL", "chrf", "bits_per_byte"),
}
LOWER_IS_BETTER = frozenset(
    {"log_loss", "brier", "expected_calibration_error", "mean_absolute_error", "mean_squared_error", "hamming_loss"}
    | {"nll", "perplexity", "bits_per_byte", "repetition", "empty"}
)
WITHOUT_DIRECTION = frozenset({"length_ratio", "ended"})


@dataclass(frozen=True)
class MetricDifference:
    """B - A in one metric."""

    metric: str
    a: float
    b: float
    difference: float
    low: float  # to `high`: 95% interval of the difference, by paired bootstrap
    high: float
    test: str
    p: float
    mid_p: float | None = None
    p_holm: float = 1.0  # p adjusted for all tests of the comparison
    shown: bool = False  # p_holm is at most 0.05
    better: str | None = None  # "a" or "b" where a difference is shown and the metric has a better side


@dataclass(frozen=True)
class ChangedRow:
    """A row that one of two systems does better, with the prediction of each."""

    id: Any
    a: dict[str, Any]
    b: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two of the runs, by their index."""

    a: int
    b: int
    differences: list[MetricDifference]
    only_b: int  # number of rows that this side alone has right
    only_a: int
    right_means: str  # the metric that is the share of correct rows
    gained: list[ChangedRow]  # examples of rows that B does better, the largest change first
    lost: list[ChangedRow]

    @property
    def shown(self) -> list[MetricDifference]:
        """The significant differences."""
        return [difference for difference in self.differences if difference.shown]


@dataclass(frozen=True)
class Comparison:
    """Runs on the same rows."""

    runs: list[str]
    results: list[str]
    kind: str
    dataset_name: str
    dataset_split: str
    rows: int
    rows_sha256: str
    seed: int
    resamples: int
    tests: int  # number of p-values that Holm's correction is for
    groups: int | None = None  # number of groups of rows, which are resampled and swapped as wholes; None without any
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what else differs than the models: a sentence for each result

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
    """Compare runs, or folders of results, on the same evaluation: each with the first one, or each with each.

    `name` is of the evaluation where there are several, `metrics` are by default a few of its kind, and `examples` is
    the number of rows to show for each direction. UserError where there are fewer than two runs, no result in common,
    different rows, or a metric that they do not have.
    """
    if len(runs) < 2:
        raise UserError("a comparison needs two runs or more")
    for option, number, least in (("--resamples", resamples, 100), ("--examples", examples, 0), ("--seed", seed, 0)):
        if number < least:
            raise UserError(f"{option} is {number}: it is at least {least}")
    results = choose_results(runs, name)
    groups = groups_of(results)
    sides = [measure_rows(result, groups) for result in results]
    for result, side in zip(results, sides, strict=True):
        if side.classes != sides[0].classes:
            both = f"{results[0].folder} and {result.folder}"
            raise UserError(f"{both} cannot be compared: {sides[0].classes} and {side.classes} classes")
    facts = results[0].facts
    chosen = _choose_metrics(facts["kind"], sides, metrics)
    units = len(results[0].predictions) if groups is None else int(groups.max()) + 1
    draws = {"seed": seed, "resamples": resamples}
    pairs = []
    for a, b in combinations(range(len(runs)), 2) if all_pairs else [(0, b) for b in range(1, len(runs))]:
        differences = _differences(sides[a], sides[b], chosen, units, groups is not None, draws)
        only_a, only_b = sides[a].right & ~sides[b].right, sides[b].right & ~sides[a].right
        gain = sides[b].scores - sides[a].scores
        # where correctness is the same, the rows whose score changed most
        gained, lost = (only_b, only_a) if (only_a | only_b).any() else (gain > 0, gain < 0)
        largest = [
            _largest(results[a], results[b], rows, change, examples) for rows, change in ((gained, gain), (lost, -gain))
        ]
        pairs.append(Pair(a, b, differences, int(only_b.sum()), int(only_a.sum()), sides[a].right_means, *largest))
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
        groups=None if groups is None else units,
        pairs=_corrected(pairs),
        notes=[
            *(note for result in results[1:] for note in _other_decoding(results[0], result)),
            *(note for result, side in zip(results, sides, strict=True) for note in _undefined(result, side, chosen)),
        ],
    )


def _other_decoding(first: Result, other: Result) -> list[str]:
    """The sentence that says how texts were generated otherwise than in the first result; empty where they were not."""
    ours, theirs = first.facts.get("decoding") or {}, other.facts.get("decoding") or {}
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    differing = ", ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in names)
    return [f"{other.folder} was decoded otherwise than {first.folder}: {differing}"] if names else []


def _undefined(result: Result, side: MeasuredRows, metrics: Sequence[str]) -> list[str]:
    """A sentence for each metric that the rows of a result do not define, so that it cannot be compared."""
    found = values([side.statistics[name] for name in metrics])
    absent = [name for name in metrics if not np.isfinite(found[name])]
    return [f"{name} is undefined in {result.folder}, and is not compared" for name in absent]


def _choose_metrics(kind: str, sides: Sequence[MeasuredRows], names: Sequence[str]) -> list[str]:
    common = [name for name in sides[0].statistics if all(name in side.statistics for side in sides)]
    for name in names:
        if name not in common:
            raise UserError(f"--metrics: {name!r} is not a metric of all these results; there are {', '.join(common)}")
    return list(dict.fromkeys(names)) or [name for name in DEFAULT_METRICS[kind] if name in common]


def _largest(a: Result, b: Result, mask: np.ndarray, change: np.ndarray, count: int) -> list[ChangedRow]:
    """The rows of a mask, the largest change first."""
    rows = np.flatnonzero(mask)
    first = rows[np.argsort(-change[rows], kind="stable")][:count].tolist()
    return [ChangedRow(a.predictions[row]["id"], a.predictions[row], b.predictions[row]) for row in first]


def _differences(
    a: MeasuredRows, b: MeasuredRows, metrics: Sequence[str], units: int, grouped: bool, draws: dict[str, int]
) -> list[MetricDifference]:
    """The difference of every metric that both sides have over `units` rows, or groups where they are `grouped`.

    McNemar's test is for independent rows only.
    """
    needed = list({id(a.statistics[name]): name for name in metrics}.values())
    of_a, of_b = ([side.statistics[name] for name in needed] for side in (a, b))
    intervals = paired_bootstrap(of_a, of_b, units, **draws)
    values_a, values_b = values(of_a), values(of_b)
    swapped: dict[str, float] = {}
    differences = []
    for name in metrics:
        value_a, value_b = values_a[name], values_b[name]
        if name not in intervals or not np.isfinite(value_b - value_a):
            continue
        low, high, p = intervals[name]
        test, mid_p, one, other = BOOTSTRAP, None, a.statistics[name], b.statistics[name]
        if name == a.right_means and not grouped:
            test = MCNEMAR
            p, mid_p = mcnemar(int((a.right & ~b.right).sum()), int((b.right & ~a.right).sum()))
        elif isinstance(one, OfSums) and isinstance(other, OfSums):
            if name not in swapped:
                swapped |= swap_test(one, other, **draws)
            test, p = SWAP, swapped[name]
        differences.append(MetricDifference(name, value_a, value_b, value_b - value_a, low, high, test, p, mid_p))
    return differences


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with p_holm over all of their tests, `shown` and `better`."""
    adjusted = iter(holm([difference.p for pair in pairs for difference in pair.differences]))

    def judged(one: MetricDifference) -> MetricDifference:
        p_holm, better = next(adjusted), None
        if p_holm <= LEVEL and one.metric not in WITHOUT_DIRECTION:
            better = "b" if (one.difference < 0) == (one.metric in LOWER_IS_BETTER) else "a"
        return replace(one, p_holm=p_holm, shown=p_holm <= LEVEL, better=better)

    return [replace(pair, differences=[judged(one) for one in pair.differences]) for pair in pairs]
