"""What a sweep found: the trials ranked over seeds, each tested against the default, and the winner on new rows.

Every trial is compared with trial 0 over the same seeds, and p-values are corrected for the number of trials (Holm).
The winner of many is the luckiest of them too, so only its metric on rows that the search never saw is unbiased.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from isotune.commands.sweep.plan import Plan
from isotune.commands.sweep.space import Values
from isotune.commands.sweep.study import Pruned, Score
from isotune.evaluation.comparison import LEVEL
from isotune.evaluation.statistics.paired_tests import holm
from isotune.evaluation.statistics.seeds import SeedDifference, compare_seeds

# of a metric in training, its names in the result of an evaluation: the first one that the result has
TESTED_AS = {"eval_loss": ("log_loss", "mean_squared_error", "perplexity"), "eval_perplexity": ("perplexity",)}


@dataclass(frozen=True)
class Trial:
    """Values that were tried.

    Attributes:
        scores: the metric of each seed; empty where a run failed, as `failure` says, or the trial was pruned.
        against_default: its difference from trial 0; None of trial 0 itself.
        p_holm: p of that difference, corrected for all trials; None where there is none.
    """

    number: int
    values: Values
    scores: tuple[float, ...] = ()
    failure: str | None = None
    against_default: SeedDifference | None = None
    p_holm: float | None = None
    pruned: Pruned | None = None

    @property
    def score(self) -> Score:
        """As the study is told it."""
        return self.mean if self.scores else self.pruned

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.scores))

    @property
    def deviation(self) -> float | None:
        """Of the seeds; None of one."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None

    @property
    def name(self) -> str:
        """Its folder in the sweep."""
        return f"trial-{self.number:03}"


@dataclass(frozen=True)
class Examined:
    """The winner and the default on rows that the search never saw, by seed; one of them where they are the same."""

    metric: str
    rows: str
    count: int
    winner: tuple[float, ...]
    default: tuple[float, ...]
    difference: SeedDifference | None
    winners_so_far: int = 1  # trials beside the default that these rows have judged, by this and earlier calls

    @property
    def is_beyond_noise(self) -> bool | None:
        """Whether p is at most 0.05; None where one seed leaves it open."""
        return None if self.difference is None or self.difference.p is None else self.difference.p <= LEVEL


@dataclass(frozen=True)
class Ranking:
    """Trials, the best first; behind them those that were pruned, the later ones first, and those that failed."""

    metric: str
    higher_is_better: bool
    seeds: list[int]
    trials: list[Trial]

    @property
    def winner(self) -> Trial:
        """The best."""
        return self.trials[0]

    @property
    def default(self) -> Trial:
        """The recipe without anything searched."""
        return next(trial for trial in self.trials if trial.number == 0)


def rank(plan: Plan, trials: Sequence[Trial]) -> Ranking:
    """The trials in order, tested against trial 0, which is among them; of equal ones the earlier is first."""
    default = next(trial for trial in trials if trial.number == 0)
    others = [trial for trial in trials if trial.scores and trial.number]
    differences = {trial.number: compare_seeds(default.scores, trial.scores) for trial in others}
    tested = [number for number, one in differences.items() if one.p is not None]
    adjusted = dict(zip(tested, holm([differences[number].p or 0.0 for number in tested]), strict=True))
    complete = [
        replace(one, against_default=differences.get(one.number), p_holm=adjusted.get(one.number))
        for one in trials
        if one.scores
    ]
    sign = -1 if plan.higher_is_better else 1
    complete.sort(key=lambda trial: (sign * trial.mean, trial.number))
    pruned = [trial for trial in trials if trial.pruned is not None]
    pruned.sort(key=lambda trial: _pruned_place(trial, sign))
    failed = [trial for trial in trials if trial.score is None]
    return Ranking(plan.metric, plan.higher_is_better, plan.seeds, [*complete, *pruned, *failed])


def metric_in_result(metric: str, metrics: Collection[str]) -> str | None:
    """The name that a metric of training has in the result of an evaluation; None where it has none."""
    names = TESTED_AS.get(metric, (metric.removeprefix("eval_"),))
    return next((name for name in names if name in metrics), None)


def verdict(ranking: Ranking, examined: Examined) -> str:
    """The sentence that a sweep ends with."""
    winner, name = ranking.winner, examined.metric.replace("_", " ")
    on = f"on {examined.count:,} rows that the search never saw"
    if winner.number == 0:
        own = f"{name} {np.mean(examined.winner):.4f} {on}"
        return f"No trial has a better {_plain(ranking.metric)} than the default, which has {own}."
    difference = examined.difference
    assert difference is not None
    values = f"{np.mean(examined.winner):.4f} against {np.mean(examined.default):.4f} of the default"
    start = f"{winner.name} has {name} {values} {on}"
    if difference.p is None:
        return f"{start}: one seed shows no seed noise, so whether it is better stays open (--seeds 3 would say more)."
    better = (difference.difference > 0) == ranking.higher_is_better and difference.difference != 0
    how = f"difference {difference.difference:+.4f}{_interval(difference)} over {len(examined.winner)} seeds"
    how += f", p {difference.p:.2g}"
    if not examined.is_beyond_noise:
        return f"{start} ({how}): it does not beat the default beyond seed noise."
    return f"{start} ({how}): it {'beats' if better else 'is worse than'} the default beyond seed noise."


def table(ranking: Ranking) -> list[str]:
    """The lines of the ranking."""
    keys = list(ranking.default.values)
    heads = ["trial", *keys, _plain(ranking.metric), "deviation", "to default", "95% interval", "p (Holm)"]
    rows = [heads, *(_cells(trial, keys) for trial in ranking.trials)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_dict(plan: Plan, ranking: Ranking, examined: Examined, sentence: str) -> dict[str, Any]:
    """sweep.json."""
    trials = [{**asdict(trial), "folder": trial.name} for trial in ranking.trials]
    for trial, one in zip(trials, ranking.trials, strict=True):
        trial |= {"mean": one.mean, "deviation": one.deviation} if one.scores else {}
    return {
        **plan.as_dict(),
        "metric": ranking.metric,
        "higher_is_better": ranking.higher_is_better,
        "trials": trials,
        "winner": ranking.winner.name,
        "examined": {**asdict(examined), "is_beyond_noise": examined.is_beyond_noise},
        "verdict": sentence,
    }


def _pruned_place(trial: Trial, sign: int) -> tuple[float, ...]:
    assert trial.pruned is not None
    value = trial.pruned.value
    return -trial.pruned.step, math.inf if value is None else sign * value, trial.number


def _cells(trial: Trial, keys: Sequence[str]) -> list[str]:
    values = [_short(trial.values[key]) for key in keys]
    if trial.pruned is not None:
        last = "" if trial.pruned.value is None else f"{trial.pruned.value:.4f}"
        return [trial.name, *values, last, "", f"pruned at step {trial.pruned.step}", "", ""]
    if not trial.scores:
        return [trial.name, *values, "failed", "", "", "", ""]
    deviation = "" if trial.deviation is None else f"{trial.deviation:.4f}"
    cells = [trial.name, *values, f"{trial.mean:.4f}", deviation]
    if (difference := trial.against_default) is None:
        return [*cells, "default", "", ""]
    interval = "" if difference.low is None else f"{difference.low:+.4f} to {difference.high:+.4f}"
    return [*cells, f"{difference.difference:+.4f}", interval, "" if trial.p_holm is None else f"{trial.p_holm:.3f}"]


def _interval(difference: SeedDifference) -> str:
    return "" if difference.low is None else f", 95% interval {difference.low:+.4f} to {difference.high:+.4f}"


def _plain(metric: str) -> str:
    return metric.removeprefix("eval_").replace("_", " ")


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
