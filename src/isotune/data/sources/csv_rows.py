"""Reads rows from CSV and TSV files: every cell is the text that stands in the file.

RFC 4180 says how cells are quoted. Real files have a blank before a quoted cell (`"Buddha", "I want ..."`), which makes
the quotes text and every comma inside a new cell; semicolons, where a spreadsheet uses the comma for decimals, also
below a first line `sep=;`; empty columns behind the last; and TSV without quoting, in which a quote is text. A file is
read once before its rows are: the first way in which every row has as many cells as the first is its way, and one that
is not the usual one is noted.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from isotune.data.sources.text_files import open_text, undecoded
from isotune.io.errors import UserError, shown
from isotune.io.formats import format_of

SHOWN_CHARACTERS = 60
CELL_CHARACTERS = 2**28  # an unclosed quote reads to the end of the file, which need not fit into memory
OTHER_DELIMITERS = (";", "\t", "|")
LONGEST_NAME = 40  # characters of a column's name; a text is longer
_NUMBERS = re.compile(r"[\d\s.,:/+-]+")
_DELIMITER_LINE = re.compile(r'"?sep=(.)"?\s*', re.I)


@dataclass(frozen=True)
class Dialect:
    """How the cells of a file are told apart."""

    delimiter: str = ","
    has_quotes: bool = True  # else a quote is a character like any other
    skips_blanks: bool = False  # blanks at the start of a cell are no part of it
    is_declared: bool = False  # by line 1, which is no row and names no columns

    def __str__(self) -> str:
        parts = [f"cells end at {self.delimiter!r}" + (", as line 1 says" if self.is_declared else "")]
        parts += ["blanks at the start of cells are left out"] if self.skips_blanks else []
        parts += [] if self.has_quotes else ["quotes are text"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Survey:
    """What one reading of the file found."""

    dialect: Dialect
    names: tuple[str, ...]  # of the columns
    rows: int
    empty_lines: int
    empty_columns: int  # behind these, without a name and without any cell


class _Unfit(Exception):
    """The file cannot be read in a dialect: the sentence, without the file's name."""


class CsvFile:
    """One file, with the names of its columns where its first line does not have them."""

    def __init__(self, path: Path, columns: Sequence[str] | None = None) -> None:
        self.path, self.columns = path, tuple(columns) if columns else None

    def rows(self, notes: list[str]) -> Iterator[dict[str, str]]:
        """The rows by the names of their columns; UserError names the line of a broken one before any is read."""
        survey = self.survey
        usual = Dialect("\t" if format_of(self.path) == ".tsv" else ",")
        if survey.dialect != usual:
            notes.append(f"{self.path.name}: {survey.dialect}")
        if survey.empty_lines:
            notes.append(f"{self.path.name}: {survey.empty_lines} empty lines")
        if survey.empty_columns:
            notes.append(f"{self.path.name}: {survey.empty_columns} empty columns at the end")
        names = survey.names
        width = len(names) + survey.empty_columns if self.columns else 0  # as in `_try`: not known before the names
        for cells, _ in read_cells(self.path, survey.dialect):
            if _is_empty(cells, width):
                continue
            if not width:
                width = len(names) + survey.empty_columns
                continue
            yield dict(zip(names, cells[: len(names)], strict=True))

    @cached_property
    def survey(self) -> Survey:
        """The dialect in which every row has as many cells as there are columns."""
        first_fault: _Unfit | None = None
        for dialect in self._dialects():
            try:
                found = self._try(dialect)
                if dialect.delimiter != "\t" or not dialect.has_quotes:
                    return found
                return self._without_merged_lines(found)
            except _Unfit as fault:
                first_fault = first_fault or fault
        raise UserError(f"{self.path} {first_fault}")

    def has_names(self, columns: Sequence[str]) -> bool:
        """Whether the first line names these columns, in any order and perhaps beside others."""
        return any(are_names(self._first_cells(dialect), columns) for dialect in self._dialects())

    def _dialects(self) -> Iterator[Dialect]:
        """The dialects to try, the likeliest first."""
        if format_of(self.path) == ".tsv":
            yield from (Dialect("\t"), Dialect("\t", has_quotes=False), Dialect("\t", skips_blanks=True))
            return
        with open_text(self.path) as file:
            declared = _DELIMITER_LINE.fullmatch(file.readline(CELL_CHARACTERS))
        if declared:
            yield Dialect(declared[1], is_declared=True)
            return
        first = self._first_cells(Dialect())
        if len(first) == 1:
            for delimiter in OTHER_DELIMITERS:
                names = _named(self._first_cells(Dialect(delimiter)))
                if len(names) > 1 and all(0 < len(name) <= LONGEST_NAME for name in names):
                    yield Dialect(delimiter)
        blanks = Dialect(skips_blanks=True)
        if any(cell[:1] == " " and cell.lstrip(" ")[:1] == '"' for cell in first):
            yield blanks
        yield from (Dialect(), blanks)

    def _first_cells(self, dialect: Dialect) -> list[str]:
        try:
            found = (cells for cells, _ in read_cells(self.path, dialect) if not _is_empty(cells, 0))
            return next(found, list[str]())
        except csv.Error:
            return []

    def _without_merged_lines(self, quoted: Survey) -> Survey:
        """The reading of a TSV in which quotes are text, where that is one too and finds more rows.

        A quoted cell with a line end is cut in two by it, and then the rows do not have as many cells each.
        """
        try:
            plain = self._try(replace(quoted.dialect, has_quotes=False))
        except _Unfit:
            return quoted
        return plain if plain.rows > quoted.rows else quoted

    def _try(self, dialect: Dialect) -> Survey:
        names, count, empty_lines = self.columns, 0, 0
        width = used = len(names or ())  # cells of a row; those up to the last that is not empty in some row
        line = first = 2 if dialect.is_declared else 1  # where the row begins, and the names of the columns
        try:
            for cells, last_line in read_cells(self.path, dialect):
                if _is_empty(cells, width):
                    empty_lines += 1
                elif names is None:
                    self._check_text(cells, cells, f"line {line}")
                    names, width, used, first = tuple(cells), len(cells), len(_named(cells)), line
                    self._check_names(names[:used], first)
                else:
                    if not count and self.columns and are_names(cells, self.columns):
                        raise UserError(f"{self.path} line {line} names these columns: leave dataset_columns out")
                    count += 1
                    self._check_text(cells, names, f"line {line} (row {count})")
                    if len(cells) != width:
                        start = shown(dialect.delimiter.join(cells))
                        who = "dataset_columns names" if self.columns else f"line {first} names"
                        raise _Unfit(
                            f"line {line} (row {count}) has {len(cells)} cells, and {who} {width} columns: {start}"
                        )
                    if "".join(cells[used:]).strip():
                        if used < width - 1 and not looks_like_row(names[:used]):
                            stray = shown("".join(cells[used:]).strip())
                            raise _Unfit(f"line {line} (row {count}) has {stray} in a column without a name")
                        used = width
                        self._check_names(names, first)
                line = last_line + 1
        except csv.Error as error:
            raise _Unfit(f"line {line} is not readable as CSV: {error}") from error
        return Survey(dialect, (names or ())[:used], count, empty_lines, width - used)

    def _check_text(self, cells: list[str], names: Sequence[str], where: str) -> None:
        if undecoded("".join(cells)):
            number = next(number for number, cell in enumerate(cells) if undecoded(cell))
            column = f"column {shown(names[number], 24)}" if cells is not names and number < len(names) else "a cell"
            raise UserError(f"{self.path} {where}, {column}, {undecoded(cells[number])}")

    def _check_names(self, names: Sequence[str], line: int) -> None:
        duplicates = [name for number, name in enumerate(names) if name in names[:number]]
        if duplicates and not looks_like_row(names):
            raise UserError(f"{self.path} line {line} names the column {shown(duplicates[0])} twice")
        if duplicates:
            raise UserError(unnamed_columns(f"{self.path} line {line}", names))


def read_cells(path: Path, dialect: Dialect | None = None) -> Iterator[tuple[list[str], int]]:
    """The cells of each row of a CSV file, none for an empty line, and the line where the row ends.

    UserError where the file cannot be read, csv.Error from where on it is no CSV.
    """
    csv.field_size_limit(CELL_CHARACTERS)
    dialect = dialect or Dialect()
    quoting: Any = csv.QUOTE_MINIMAL if dialect.has_quotes else csv.QUOTE_NONE
    with open_text(path) as file:
        before = 0
        if dialect.is_declared:
            file.readline()
            before = 1
        rows = csv.reader(
            file, delimiter=dialect.delimiter, quoting=quoting, skipinitialspace=dialect.skips_blanks, strict=True
        )
        for cells in rows:
            yield cells, rows.line_num + before


def _named(cells: Sequence[str]) -> Sequence[str]:
    """The cells of a line of names without the empty ones at its end."""
    used = len(cells)
    while used and not cells[used - 1].strip():
        used -= 1
    return cells[:used]


def are_names(cells: Sequence[str], columns: Sequence[str]) -> bool:
    """Whether the names of all these columns are among the cells of a line, in any case and order."""
    return {name.strip().casefold() for name in columns} <= {cell.strip().casefold() for cell in cells}


def _is_empty(cells: list[str], columns: int) -> bool:
    """Whether a line holds no row: nothing, or blanks where several cells are due."""
    return not cells or (len(cells) == 1 and columns != 1 and not cells[0].strip())


def looks_like_row(names: Sequence[str]) -> bool:
    """Whether cells are more likely a row than the names of columns: a number, a date, a long text.

    pandas numbers columns that have no names, and leaves the name of the first empty where it is an index.
    """
    if list(names) in ([str(n) for n in range(len(names))], ["", *(str(n) for n in range(len(names) - 1))]):
        return False
    is_text = any(len(name) > LONGEST_NAME or "\n" in name or _NUMBERS.fullmatch(name) for name in names)
    return is_text or "" in names[1:]


def unnamed_columns(where: str, names: Sequence[str], *, are_conversations: bool = False) -> str:
    """The sentence that says that cells which stand in place of the columns' names are a row."""
    longest = max(range(len(names)), key=lambda column: len(names[column]))
    guesses = [f"column{n + 1}" for n in range(len(names))]
    guesses[longest] = "text"
    number = next((n for n, name in enumerate(names) if n != longest and name.strip().isdigit()), None)
    if number is None and len(names) == 2:
        number = 1 - longest
    if are_conversations:
        guesses = ["prompt", "completion"] if len(names) == 2 else guesses
    elif number is not None:
        guesses[number] = "label"
    cells = ", ".join(shown(name, 24) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{where} does not name the columns but holds a row ({cells}): name them in their order, such as "
        f"--dataset_columns {' '.join(guesses)}"
    )
