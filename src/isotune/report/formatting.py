"""Numbers, run letters and comparisons as the terminal and the HTML report write them."""

import math
import string
from collections.abc import Sequence
from typing import Any

from isotune.evaluation.comparison import ChangedRow, Comparison, MetricDifference, Pair
from isotune.evaluation.results import CLASSIFICATION

NO_DIFFERENCE = "no difference shown"
MAX_TEXT_CHARACTERS = 100
_RIGHT_ALIGNED = {1, 2, 3, 6, 7}


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


def comparison_text(comparison: Comparison) -> str:
    """The runs, then for each pair a table, the changed rows and the conclusion."""
    names = [run_letter(index) for index in range(len(comparison.results))]
    head = f"{comparison.rows:,} rows of {comparison.dataset_name} ({comparison.dataset_split})"
    blocks = [[head, *(f"{name}  {folder}" for name, folder in zip(names, comparison.results, strict=True))]]
    blocks[0] += [f"note: {note}" for note in comparison.notes]
    for pair in comparison.pairs:
        changes = _changes(pair, names, comparison.kind)
        blocks.append([*_table(pair, names), "", *changes, pair_conclusion(pair, names)])
    return "\n\n".join("\n".join(block) for block in [*blocks, [describe_tests(comparison)]])


def _table(pair: Pair, names: Sequence[str]) -> list[str]:
    a, b = names[pair.a], names[pair.b]
    rows = [["metric", a, b, f"{b} - {a}", "95% interval", "test", "p", "p (Holm)", ""]]
    rows += [
        [
            difference.metric,
            format_number(difference.a),
            format_number(difference.b),
            format_signed(difference.difference),
            f"{format_signed(difference.low)} to {format_signed(difference.high)}",
            difference.test,
            format_p(difference.p),
            format_p(difference.p_holm),
            metric_conclusion(difference, pair, names),
        ]
        for difference in pair.differences
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in _RIGHT_ALIGNED else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _changes(pair: Pair, names: Sequence[str], kind: str) -> list[str]:
    a, b = names[pair.a], names[pair.b]
    right = f"{pair.right_means}: {pair.only_b:,} rows right in {b} only, {pair.only_a:,} in {a} only"
    lines = [right] if pair.right_means else []
    for sign, rows in (("+", pair.gained), ("-", pair.lost)):
        for row in rows:
            lines += [f"  {sign} row {row.id}: {_input(row, kind)}"]
            lines += [f"      {name}  {_prediction(side, kind)}" for name, side in ((a, row.a), (b, row.b))]
    return lines


def _input(row: ChangedRow, kind: str) -> str:
    if kind != CLASSIFICATION:
        return _shorten(row.a["prompt"])
    label = row.a["label"]
    own = f"class {label}" if isinstance(label, int) else _in_words(row.a, "label")
    return f"{own}  {_shorten(str(row.a.get('text', '')))}".rstrip()


def _prediction(row: dict[str, Any], kind: str) -> str:
    if kind != CLASSIFICATION:
        return _shorten(row["text"])
    if not isinstance(row["label"], int):
        return _in_words(row, "prediction")
    label = max(range(len(row["probabilities"])), key=row["probabilities"].__getitem__)
    return f"class {label} with {row['probabilities'][label]:.3f}"


def _in_words(row: dict[str, Any], key: str) -> str:
    """The labels or the number of a row."""
    if isinstance(row[key], list):
        return f"labels {', '.join(map(str, row.get(f'{key}_names', row[key]))) or 'none'}"
    return f"{row[key]:.4g}"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT_CHARACTERS else line[: MAX_TEXT_CHARACTERS - 3] + "..."
