"""A comparison as text for the terminal."""

from collections.abc import Sequence
from typing import Any

from isotune.evaluation.comparison.compare import ChangedRow, Comparison, Pair
from isotune.evaluation.results import CLASSIFICATION
from isotune.report.formatting import (
    describe_tests,
    format_number,
    format_p,
    format_signed,
    metric_conclusion,
    pair_conclusion,
    run_letter,
)

MAX_TEXT_CHARACTERS = 100
_RIGHT_ALIGNED = {1, 2, 3, 6, 7}


def comparison_text(comparison: Comparison) -> str:
    """The runs, then for each pair a table, the changed rows and the conclusion."""
    names = [run_letter(index) for index in range(len(comparison.results))]
    folders = [f"{name}  {folder}" for name, folder in zip(names, comparison.results, strict=True)]
    head = f"{comparison.rows:,} rows of {comparison.dataset_name} ({comparison.dataset_split})"
    blocks = [[head, *folders]]
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
    lines = [f"{pair.right_means}: {pair.only_b:,} rows right in {b} only, {pair.only_a:,} in {a} only"]
    for sign, rows in (("+", pair.gained), ("-", pair.lost)):
        for row in rows:
            lines += [f"  {sign} row {row.id}: {_input(row, kind)}"]
            lines += [f"      {name}  {_prediction(side, kind)}" for name, side in ((a, row.a), (b, row.b))]
    return lines


def _input(row: ChangedRow, kind: str) -> str:
    if kind != CLASSIFICATION:
        return _shorten(row.a["prompt"])
    return f"class {row.a['label']}  {_shorten(str(row.a.get('text', '')))}".rstrip()


def _prediction(row: dict[str, Any], kind: str) -> str:
    if kind != CLASSIFICATION:
        return _shorten(row["text"])
    label = max(range(len(row["probabilities"])), key=row["probabilities"].__getitem__)
    return f"class {label} with {row['probabilities'][label]:.3f}"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT_CHARACTERS else line[: MAX_TEXT_CHARACTERS - 3] + "..."
