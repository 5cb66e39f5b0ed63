"""Reads rows from JSON: one object a line, one array of objects, or objects one after another; in bounded memory."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

from isotune.data.sources.layout import SPLIT_WORDS
from isotune.data.sources.text_files import open_text, undecoded, undecoded_at
from isotune.io.errors import UserError, first_line, shown
from isotune.io.formats import format_of

Row = dict[str, Any]

CHUNK = 2**20  # characters read at once where a row has no line of its own
TAIL = 32  # a parser that stops so near to the end of a chunk has seen an unfinished value
TABLE_NAMES = ("data", "rows", "examples", "instances", "records", "items")
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_json(path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of a file, whatever its name says of arrays and lines; UserError names the line of a broken one.

    One object alone may be a table: columns, as pandas writes them, or rows under a name such as `data`.
    """
    rows = _read(path, notes)
    start = list(islice(rows, 2))
    if len(start) == 1:
        yield from _rows_within(start[0], path, notes)
    else:
        yield from start
        yield from rows


# beside one of these a list is a part of a row
_TEXT_COLUMNS = {"text", "prompt", "completion", "instruction", "question", "answer", "messages", "conversations"}


def _rows_within(row: Row, path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of a table that is one object; that object where it is a row itself."""
    lists = {
        name: cast(list[Row], value)
        for name, value in row.items()
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in cast(list[Any], value))
    }
    if len(lists) > 1 and all(name.lower() in SPLIT_WORDS for name in lists):
        raise UserError(f"{path} is one object with the splits {', '.join(lists)}: write each to a file of its own")
    names = [name for name in lists if name.lower() in TABLE_NAMES]
    if len(lists) == 1 and names and not _TEXT_COLUMNS & {name.lower() for name in row}:
        notes.append(f"{path.name}: rows are the list under {names[0]!r}")
        yield from lists[names[0]]
        return
    columns = [_cells(value) for value in row.values()]
    of_each = {tuple(cells) for cells in columns if cells is not None}
    if len(columns) > 1 and None not in columns and len(of_each) == 1 and "input_ids" not in row:
        notes.append(f"{path.name}: one object of columns, read as its rows")
        tables = [cells for cells in columns if cells is not None]
        yield from (dict(zip(row, each, strict=True)) for each in zip(*(own.values() for own in tables), strict=True))
        return
    yield row


def _cells(value: Any) -> dict[Any, Any] | None:
    """The cells of a column by the number or name of their row; None where a value is no column."""
    cells = dict(enumerate(cast(list[Any], value))) if isinstance(value, list) else value
    if not isinstance(cells, dict) or len(cast(dict[Any, Any], cells)) < 2:
        return None
    found = cast(dict[Any, Any], cells)
    is_numbered = isinstance(value, list) or all(str(name).isdigit() for name in found)
    return found if is_numbered and not any(isinstance(cell, dict) for cell in found.values()) else None


def _read(path: Path, notes: list[str]) -> Iterator[Row]:
    with open_text(path) as file:
        empty = 0
        while (line := file.readline(CHUNK)).isspace():
            empty += 1
        if line.lstrip().startswith("["):
            yield from _Stream(path, file, line, empty + 1).rows()
            return
        line += "" if line.endswith("\n") else file.readline()
        if line.lstrip().startswith("{") and format_of(path) == ".json" and not _is_complete(line):
            yield from _Stream(path, file, line, empty + 1).rows()
        else:
            yield from _read_lines(path, file, line, empty, notes)


def _is_complete(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_lines(path: Path, file: TextIO, first: str, empty: int, notes: list[str]) -> Iterator[Row]:
    number, line = empty + 1, first
    while line:
        if line.strip():
            yield _parse_line(path, number, line)
        else:
            empty += 1
        line = file.readline()
        number += 1
    if empty:
        notes.append(f"{path.name}: {empty} empty lines")


def _parse_line(path: Path, number: int, line: str) -> Row:
    fault = undecoded(line)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path} line {number} {fault or f'is not JSON: {first_line(error)}'}") from error
    except RecursionError as error:
        raise UserError(f"{path} line {number} is nested too deep to be a row") from error
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number} is a JSON {type(row).__name__}, not an object with columns")
    row = cast(Row, row)
    if fault:
        column = next((name for name, value in row.items() if undecoded(json.dumps(value, ensure_ascii=False))), None)
        raise UserError(f"{path} line {number}{f', column {shown(column)},' if column else ''} {fault}")
    return row


class _Stream:
    """The text of a file of which only the part that is being parsed is kept."""

    def __init__(self, path: Path, file: TextIO, text: str, line: int) -> None:
        self.path, self.file, self.text, self.line = path, file, text, line
        self.at, self.count, self.has_ended = 0, 0, False

    def rows(self) -> Iterator[Row]:
        """The objects of an array, or one after another."""
        in_array = self._peek() == "["
        if in_array:
            self.at += 1
        while (mark := self._peek()) != "":
            if in_array and mark == "]":
                self.at += 1
                if self._peek():
                    raise self._broken(self.at, "something follows the end of the array")
                return
            if in_array and self.count:
                if mark != ",":
                    raise self._broken(self.at, f"a comma or ] is missing after row {self.count}")
                self.at += 1
                self._peek()
            yield self._value()
        if in_array:
            raise self._broken(self.at, f"the array does not end: the file is cut off after row {self.count}")

    def _value(self) -> Row:
        size = CHUNK
        while True:
            try:
                row, end = _DECODER.raw_decode(self.text, self.at)
                break
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - TAIL
                if self.has_ended or not unfinished:
                    raise self._broken(error.pos, error.msg) from error
                self._read(size)
                size *= 2  # a long row is parsed a few times, not once a chunk
            except RecursionError as error:
                raise self._broken(self.at, "it is nested too deep to be a row") from error
            except ValueError as error:  # a number of more digits than Python reads
                raise self._broken(self.at, first_line(error)) from error
        if not isinstance(row, dict):
            raise self._broken(self.at, f"it is a JSON {type(row).__name__}, not an object with columns")
        if fault := undecoded(self.text[self.at : end]):
            raise self._broken(self.at + (undecoded_at(self.text[self.at : end]) or 0), f"it {fault}")
        self.at, self.count = end, self.count + 1
        return cast(Row, row)

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            self.at = cast("re.Match[str]", _SPACE.match(self.text, self.at)).end()
            if self.at < len(self.text) or self.has_ended:
                return self.text[self.at : self.at + 1]
            self._read(CHUNK)

    def _read(self, size: int) -> None:
        more = self.file.read(size)
        self.has_ended = not more
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + more, 0

    def _broken(self, position: int, why: str) -> UserError:
        line = self.line + self.text.count("\n", 0, position)
        return UserError(f"{self.path} line {line} (row {self.count + 1}) is not JSON with rows: {why}")
