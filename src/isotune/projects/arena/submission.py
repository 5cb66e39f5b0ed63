"""Writes a submission and checks one: every fault of the file, one sentence for each kind."""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isotune.data.sources.text_files import is_formula
from isotune.io.errors import UserError, shown
from isotune.io.files import replace_file
from isotune.projects.arena.battles import CLASSES, ID, read_rows

_ROWS, _IDS, _CELLS = ("row has", "rows have"), ("id is", "ids are"), ("cell holds", "cells hold")
EXAMPLES = 3  # rows or ids in one message
SUM_TOLERANCE = 1e-5  # of the sum of a row, above the rounding to six places


@dataclass(frozen=True)
class _Table:
    """A CSV file: the header, the cells of each row by its number (from 1), and what rows of a wrong width have."""

    header: list[str]
    rows: dict[int, list[str]]
    wrong_widths: list[str]

    def column(self, name: str) -> list[str]:
        """Every cell of a column, stripped."""
        index = self.header.index(name)
        return [row[index].strip() for row in self.rows.values()]


def write_submission(file: Path, ids: Sequence[str], probabilities: np.ndarray, sample: Path | None) -> None:
    """Write probabilities, float64 [rows, classes], under the competition's columns, atomically and with all digits.

    The header and the order of the ids are those of `sample`, if given; raises UserError if it is not for these ids.
    """
    if formula := next(filter(is_formula, ids), None):
        raise UserError(f"the id {shown(formula)} begins a formula, which a spreadsheet would compute: give other ids")
    header, order = [ID, *CLASSES], list(range(len(ids)))
    if sample is not None:
        table = _read(sample)
        header, sample_ids = table.header, table.column(ID)
        row_of = {row_id: row for row, row_id in enumerate(ids)}
        if sorted(sample_ids) != sorted(ids):
            raise UserError(
                f"{sample} asks for {len(sample_ids)} ids, and they are not the {len(ids)} of the test rows"
            )
        order = [row_of[row_id] for row_id in sample_ids]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([ids[row], *(repr(float(number)) for number in probabilities[row])] for row in order)
    replace_file(file, text.getvalue())


def check_submission(file: Path, sample: Path) -> tuple[list[str], int]:
    """The faults of a submission, one sentence for each kind, and its number of rows.

    It must have the sample's columns and ids in the sample's order, and in each row numbers from 0 to 1 that sum to 1.
    Raises UserError if one of the files cannot be read as a table, or the sample is not a sample submission.
    """
    expected = _read(sample)
    if expected.header[:1] != [ID] or len(expected.header) < 2 or expected.wrong_widths or not expected.rows:
        raise UserError(f"{sample} is no sample submission: it needs the column {ID!r}, columns of numbers, and rows")
    table = _read(file)
    faults = _wrong_columns(table, expected)
    faults += _sentence(_ROWS, f"not {len(table.header)} cells", table.wrong_widths)
    if ID in table.header:
        faults += _wrong_ids(table.column(ID), expected.column(ID))
    classes = expected.header[1:]
    if all(table.header.count(name) == 1 for name in classes):
        faults += _wrong_numbers(table, classes)
    return [f"{file}: {fault}" for fault in faults], len(table.rows)


def _read(file: Path) -> _Table:
    lines = read_rows(file)
    header = [name.strip() for name in next(lines, (0, [], 0))[1]]
    if not header:
        raise UserError(f"{file} is empty: a submission begins with its columns")
    rows = {number: cells for number, cells, _ in lines}
    widths = {number: len(cells) for number, cells in rows.items() if len(cells) != len(header)}
    right = {number: cells for number, cells in rows.items() if number not in widths}
    return _Table(header, right, [f"row {number} has {width}" for number, width in widths.items()])


def _wrong_columns(table: _Table, expected: _Table) -> list[str]:
    if table.header == expected.header:
        return []
    names_of = {
        "missing": [name for name in expected.header if name not in table.header],
        "unknown": [name for name in table.header if name not in expected.header],
        "twice": [name for name, count in Counter(table.header).items() if count > 1],
    }
    faults = [f"{kind} {', '.join(map(repr, names))}" for kind, names in names_of.items() if names]
    detail = "; ".join(faults) or f"they are in another order, {', '.join(table.header)}"
    return [f"the columns are not {', '.join(expected.header)}: {detail}"]


def _wrong_ids(ids: list[str], expected: list[str]) -> list[str]:
    counts, expected_set = Counter(ids), set(expected)
    problems = [
        *_sentence(_IDS, "of the sample missing", [row_id for row_id in expected if row_id not in counts]),
        *_sentence(_IDS, "not in the sample", [row_id for row_id in counts if row_id not in expected_set]),
        *_sentence(_IDS, "given more than once", [row_id for row_id, count in counts.items() if count > 1]),
    ]
    if not problems and ids != expected:
        row = next(number for number, pair in enumerate(zip(ids, expected, strict=True)) if pair[0] != pair[1])
        problems.append(f"the ids are in another order than in the sample: {ids[row]} in place of {expected[row]}")
    return problems


def _wrong_numbers(table: _Table, classes: list[str]) -> list[str]:
    """Faults of the cells; a cell is counted under its first fault, a row's sum where all its cells are numbers."""
    ids = table.column(ID) if ID in table.header else [""] * len(table.rows)
    columns = [table.column(name) for name in classes]
    not_numbers, outside, sums = [], [], []
    for number_of_row, row_id, *cells in zip(table.rows, ids, *columns, strict=True):
        row = f"row {number_of_row}" + (f" (id {row_id})" if row_id else "")
        numbers = [_number(cell) for cell in cells]
        for name, cell, number in zip(classes, cells, numbers, strict=True):
            if not math.isfinite(number):
                not_numbers.append(f"{row} has {cell[:20] or 'nothing'} as {name}")
            elif not 0.0 <= number <= 1.0:
                outside.append(f"{row} has {cell[:20]} as {name}")
        if all(map(math.isfinite, numbers)) and abs(math.fsum(numbers) - 1.0) > SUM_TOLERANCE:
            sums.append(f"{row} sums to {math.fsum(numbers):.6g}")
    return [
        *_sentence(_CELLS, "no finite number", not_numbers),
        *_sentence(_CELLS, "no number from 0 to 1", outside),
        *_sentence(_ROWS, "probabilities that do not sum to 1", sums),
    ]


def _number(cell: str) -> float:
    try:
        return float(cell) if "_" not in cell else math.nan  # only Python reads 1_0 as a number
    except ValueError:
        return math.nan


def _sentence(words: tuple[str, str], fault: str, places: list[str]) -> list[str]:
    """The sentence of a kind of fault, with a few of its places; none without any."""
    if not places:
        return []
    more = f" and {len(places) - EXAMPLES} more" if len(places) > EXAMPLES else ""
    return [f"{len(places)} {words[len(places) > 1]} {fault}: {', '.join(places[:EXAMPLES])}{more}"]
