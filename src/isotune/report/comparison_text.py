"""A comparison as lines for the terminal."""

from collections.abc import Sequence
from typing import Any

from isotune.evaluation.comparison.compare import ChangedRow, Comparison, Pair
from isotune.evaluation.results import CLASSIFICATION
from isotune.report.wording import letter, number, p_value, signed, tests_in_words, verdict, verdict_of_pair

LONGEST_TEXT = 100


def comparison_text(comparison: Comparison) -> str:
    """The runs, a table for each pair, the rows that changed, and the verdict."""
    names = [letter(i) for i in range(len(comparison.results))]
    folders = [f"{name}  {folder}" for name, folder in zip(names, comparison.results, strict=True)]
    head = f"{comparison.rows:,} rows of {comparison.dataset_name} ({comparison.dataset_split})"
    blocks = [[head, *folders]]
    for pair in comparison.pairs:
        blocks.append([*_table(pair, names), "", *_changes(pair, names, comparison.kind), verdict_of_pair(pair, names)])
    return "\n\n".join("\n".join(block) for block in [*blocks, [tests_in_words(comparison)]])


def _table(pair: Pair, names: Sequence[str]) -> list[str]:
    a, b = names[pair.a], names[pair.b]
    rows = [["metric", a, b, f"{b} - {a}", "95% interval", "test", "p", "p (Holm)", ""]]
    rows += [
        [
            one.metric,
            number(one.a),
            number(one.b),
            signed(one.difference),
            f"{signed(one.low)} to {signed(one.high)}",
            one.test,
            p_value(one.p),
            p_value(one.p_holm),
            verdict(one, pair, names),
        ]
        for one in pair.differences
    ]
    return aligned(rows, right={1, 2, 3, 6, 7})


def aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Rows of cells as lines with columns of one width; those of `right` end in line."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _changes(pair: Pair, names: Sequence[str], kind: str) -> list[str]:
    a, b = names[pair.a], names[pair.b]
    lines = [f"{pair.right_means}: {pair.only_b:,} rows right in {b} only, {pair.only_a:,} in {a} only"]
    for sign, rows in (("+", pair.gained), ("-", pair.lost)):
        for row in rows:
            lines += [f"  {sign} row {row.id}: {_asked(row, kind)}"]
            lines += [f"      {name}  {said(of, kind)}" for name, of in ((a, row.a), (b, row.b))]
    return lines


def _asked(row: ChangedRow, kind: str) -> str:
    if kind != CLASSIFICATION:
        return _short(row.a["prompt"])
    return f"class {row.a['label']}  {_short(str(row.a.get('text', '')))}".rstrip()


def said(row: dict[str, Any], kind: str) -> str:
    """What a system made of a row: its text, or the class with its probability."""
    if kind != CLASSIFICATION:
        return _short(row["text"])
    chosen = max(range(len(row["probabilities"])), key=row["probabilities"].__getitem__)
    return f"class {chosen} with {row['probabilities'][chosen]:.3f}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 3] + "..."
