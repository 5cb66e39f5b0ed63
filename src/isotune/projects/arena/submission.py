"""A submission is checked before it is sent: all that is wrong with the file, a sentence for each kind of fault."""

import csv
import io
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isotune.io.errors import UserError
from isotune.io.files import replace_file

ID = "id"
EXAMPLES = 3  # of rows or ids that a sentence names
SUM_TOLERANCE = 1e-5  # what numbers rounded to six places may miss 1 by, and more


@dataclass(frozen=True)
class _Table:
    """A CSV file as it is: the header, and cells a row; `rows` and `numbers` (from 1) have no row of a wrong width."""

    header: list[str]
    rows: list[list[str]]
    numbers: list[int]
    wrong_widths: list[tuple[int, int]]

    def column(self, name: str) -> list[str]:
        """Every cell of a column, without white space around it."""
        place = self.header.index(name)
        return [row[place].strip() for row in self.rows]


def write_submission(file: Path, ids: Sequence[str], probabilities: np.ndarray, sample: Path | None) -> None:
    """Write probabilities, float64 [rows, classes], under the competition's columns, renamed into place when whole.

    Numbers are written so that they are read back as the same numbers.

    Args:
        sample: whose header and ids the file must have, in their order; None without one.

    Raises:
        UserError: the sample is not for these ids; nothing is written then.
    """
    header = [ID, "winner_model_a", "winner_model_b", "winner_tie"]
    order = list(range(len(ids)))
    if sample is not None:
        asked = _read(sample)
        header, wanted = asked.header, asked.column(ID)
        place = {each: number for number, each in enumerate(ids)}
        if sorted(wanted) != sorted(ids):
            raise UserError(f"{sample} asks for {len(wanted)} ids, and they are not the {len(ids)} of the test rows")
        order = [place[each] for each in wanted]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([ids[row], *(repr(float(number)) for number in probabilities[row])] for row in order)
    replace_file(file, text.getvalue())


def check_submission(file: Path, sample: Path) -> tuple[list[str], int]:
    """What is wrong with a submission, a sentence for each kind of fault, and how many rows it has.

    It must have the sample's columns and ids in the sample's order, and in each row numbers from 0 to 1 that sum to 1.

    Raises:
        UserError: one of the files cannot be read as a table at all, or the sample is none.
    """
    wanted = _read(sample)
    if wanted.header[:1] != [ID] or len(wanted.header) < 2 or wanted.wrong_widths or not wanted.rows:
        raise UserError(f"{sample} is no sample submission: it needs the column {ID!r}, columns of numbers, and rows")
    found = _read(file)
    problems = [*_wrong_columns(found, wanted), *_wrong_widths(found)]
    if ID in found.header:
        problems += _wrong_ids(found.column(ID), wanted.column(ID))
    classes = wanted.header[1:]
    if all(found.header.count(name) == 1 for name in classes):
        problems += _wrong_numbers(found, classes)
    return [f"{file}: {problem}" for problem in problems], len(found.rows)


def _read(file: Path) -> _Table:
    csv.field_size_limit(sys.maxsize)
    header: list[str] = []
    rows, numbers, wrong = [], [], []
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for number, cells in enumerate((cells for cells in reader if cells), start=1):
                if len(cells) != len(header):
                    wrong.append((number, len(cells)))
                    continue
                rows.append(cells)
                numbers.append(number)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{file}, row {len(rows) + len(wrong) + 1}, is not CSV: {error}") from None
    if not header:
        raise UserError(f"{file} is empty: a submission begins with its columns")
    return _Table(header, rows, numbers, wrong)


def _wrong_columns(found: _Table, wanted: _Table) -> list[str]:
    if found.header == wanted.header:
        return []
    missing = [name for name in wanted.header if name not in found.header]
    unknown = [name for name in found.header if name not in wanted.header]
    twice = [name for name, count in Counter(found.header).items() if count > 1]
    faults = [f"{what} {', '.join(map(repr, names))}" for what, names in
              (("missing", missing), ("unknown", unknown), ("twice", twice)) if names]  # fmt: skip
    said = "; ".join(faults) or f"they stand in another order, {', '.join(found.header)}"
    return [f"the columns are not {', '.join(wanted.header)}: {said}"]


def _wrong_widths(found: _Table) -> list[str]:
    if not found.wrong_widths:
        return []
    examples = _examples(f"row {number} has {count}" for number, count in found.wrong_widths)
    return [f"{_rows(len(found.wrong_widths))} not {len(found.header)} cells: {examples}"]


def _wrong_ids(found: list[str], wanted: list[str]) -> list[str]:
    counts, asked = Counter(found), set(wanted)
    repeated = [each for each, count in counts.items() if count > 1]
    extra = [each for each in counts if each not in asked]
    missing = [each for each in wanted if each not in counts]
    problems = []
    for names, fault in (
        (missing, "of the sample missing"),
        (extra, "not in the sample"),
        (repeated, "given more than once"),
    ):
        if names:
            problems.append(f"{len(names)} {'id is' if len(names) == 1 else 'ids are'} {fault}: {_examples(names)}")
    if not problems and found != wanted:
        row = next(number for number, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        problems.append(f"the ids stand in another order than in the sample: {found[row]} where {wanted[row]} is due")
    return problems


def _wrong_numbers(found: _Table, classes: list[str]) -> list[str]:
    """Faults of the cells; a cell is counted under its first fault, a row's sum where all its cells are numbers."""
    ids = found.column(ID) if ID in found.header else [""] * len(found.rows)
    named = [
        f"row {number}" + (f" (id {each})" if each else "") for number, each in zip(found.numbers, ids, strict=True)
    ]
    not_numbers, outside, sums = [], [], []
    for row, cells in zip(named, zip(*(found.column(name) for name in classes), strict=True), strict=True):
        numbers = [_number(cell) for cell in cells]
        for name, cell, number in zip(classes, cells, numbers, strict=True):
            if not math.isfinite(number):
                not_numbers.append(f"{row} has {cell[:20] or 'nothing'} as {name}")
            elif not 0.0 <= number <= 1.0:
                outside.append(f"{row} has {cell[:20]} as {name}")
        if all(map(math.isfinite, numbers)) and abs(math.fsum(numbers) - 1.0) > SUM_TOLERANCE:
            sums.append(f"{row} sums to {math.fsum(numbers):.6g}")
    problems = []
    for faults, what in ((not_numbers, "no finite number"), (outside, "no number from 0 to 1")):
        if faults:
            problems.append(
                f"{len(faults)} {'cell holds' if len(faults) == 1 else 'cells hold'} {what}: {_examples(faults)}"
            )
    if sums:
        problems.append(f"{_rows(len(sums))} probabilities that do not sum to 1: {_examples(sums)}")
    return problems


def _number(cell: str) -> float:
    try:
        return float(cell) if "_" not in cell else math.nan  # Python alone reads 1_0 as a number
    except ValueError:
        return math.nan


def _rows(count: int) -> str:
    return "1 row has" if count == 1 else f"{count} rows have"


def _examples(items: Iterable[str]) -> str:
    named = list(items)
    more = len(named) - EXAMPLES
    return ", ".join(named[:EXAMPLES]) + (f" and {more} more" if more > 0 else "")
