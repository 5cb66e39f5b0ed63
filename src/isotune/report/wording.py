"""How numbers and verdicts are written for people, the same on the terminal and in the report."""

import math
import string
from collections.abc import Sequence
from typing import Any

from isotune.evaluation.comparison.compare import Comparison, MetricDifference, Pair

NO_DIFFERENCE = "no difference shown"


def letter(number: int) -> str:
    """A, B, ..., Z, then R27, R28, ...: what a run is called in a table."""
    return string.ascii_uppercase[number] if number < 26 else f"R{number + 1}"


def number(value: Any) -> str:
    """A number short enough to read: whole numbers with thousands, others with four decimals or digits."""
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


def signed(value: float) -> str:
    """A difference, with its sign."""
    return ("+" if value > 0 else "") + number(value)


def p_value(p: float) -> str:
    """Two digits, as a power of ten where it is small."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def verdict(difference: MetricDifference, pair: Pair, names: Sequence[str]) -> str:
    """What a row of the table comes to; `names` are the runs' by their number."""
    if not difference.shown:
        return NO_DIFFERENCE
    if difference.better is None:
        return "they differ"
    return f"{names[pair.b if difference.better == 'b' else pair.a]} is better"


def verdict_of_pair(pair: Pair, names: Sequence[str]) -> str:
    """What all metrics of a pair come to, in a sentence."""
    a, b = names[pair.a], names[pair.b]
    if not pair.shown:
        return f"{NO_DIFFERENCE} between {a} and {b}: nothing here is more than chance explains"
    parts = []
    for side, name in (("a", a), ("b", b)):
        better = [one.metric for one in pair.shown if one.better == side]
        if better:
            parts.append(f"{name} is better in {', '.join(better)}")
    if neither := [one.metric for one in pair.shown if one.better is None]:
        parts.append(f"{a} and {b} differ in {', '.join(neither)}")
    return "; ".join(parts)


def tests_in_words(comparison: Comparison) -> str:
    """What the columns of a comparison are."""
    tests = "1 test" if comparison.tests == 1 else f"{comparison.tests} tests"
    groups = f"; rows of one of {comparison.groups:,} prompts go together" if comparison.groups else ""
    return (
        f"Differences on the same rows with 95% intervals by paired bootstrap ({comparison.resamples:,} resamples, "
        f"seed {comparison.seed}{groups}). p (Holm) is adjusted for all {tests} here; at most 0.05 shows a difference."
    )
