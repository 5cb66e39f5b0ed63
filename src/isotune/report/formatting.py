"""How the terminal and the HTML report write numbers, run letters and the conclusions of a comparison."""

import math
import string
from collections.abc import Sequence
from typing import Any

from isotune.evaluation.comparison.compare import Comparison, MetricDifference, Pair

NO_DIFFERENCE = "no difference shown"


def run_letter(index: int) -> str:
    """A, B, ..., Z, then R27, R28, ...: the short name of a run in a table."""
    return string.ascii_uppercase[index] if index < 26 else f"R{index + 1}"


def format_number(value: Any) -> str:
    """A number in few characters: integers with thousands separators, others with four decimals or digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e3:
        return f"{value:.4f}"
    return f"{value:,.1f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


def format_signed(value: float) -> str:
    """A difference with its sign."""
    return ("+" if value > 0 else "") + format_number(value)


def format_p(p: float) -> str:
    """A p-value: three decimals, or scientific notation below 0.001."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def metric_conclusion(difference: MetricDifference, pair: Pair, names: Sequence[str]) -> str:
    """The conclusion about one metric; `names` are the runs' names by index."""
    if not difference.shown:
        return NO_DIFFERENCE
    if difference.better is None:
        return "they differ"
    return f"{names[pair.b if difference.better == 'b' else pair.a]} is better"


def pair_conclusion(pair: Pair, names: Sequence[str]) -> str:
    """The conclusion about a pair of runs over all metrics, in a sentence."""
    a, b = names[pair.a], names[pair.b]
    if not pair.shown:
        return f"{NO_DIFFERENCE} between {a} and {b}: nothing here is more than chance explains"
    parts = []
    for side, name in (("a", a), ("b", b)):
        better = [difference.metric for difference in pair.shown if difference.better == side]
        if better:
            parts.append(f"{name} is better in {', '.join(better)}")
    if neither := [difference.metric for difference in pair.shown if difference.better is None]:
        parts.append(f"{a} and {b} differ in {', '.join(neither)}")
    return "; ".join(parts)


def describe_tests(comparison: Comparison) -> str:
    """How the intervals and p-values of a comparison were computed."""
    tests = "1 test" if comparison.tests == 1 else f"{comparison.tests} tests"
    groups = f"; rows of one of {comparison.groups:,} prompts go together" if comparison.groups else ""
    return (
        f"Differences on the same rows with 95% intervals by paired bootstrap ({comparison.resamples:,} resamples, "
        f"seed {comparison.seed}{groups}). p (Holm) is adjusted for all {tests} here; at most 0.05 shows a difference."
    )
