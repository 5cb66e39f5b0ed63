"""Reads the rows of JSON, CSV, Parquet and Arrow files; errors name the line of the broken row.

Arrow reads what RFC 4180 allows of CSV. Real files have a blank before a quoted cell (`"Buddha", "I want ..."`), which
makes the quotes text and every comma inside a new cell. Where Arrow refuses a file, the blanks at the start of cells
are removed and the file is read again. An error names whatever is still broken.
"""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from isotune.io.errors import UserError, first_line

Row = dict[str, Any]

ROWS_AT_ONCE = 1_000
SHOWN_CHARACTERS = 60


def read_dataset(dataset: Any) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`."""
    for batch in dataset.with_format("arrow").iter(ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON: {first_line(error)}") from error
            except RecursionError as error:
                raise UserError(f"{path} line {number} is nested too deep to be a row") from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} is a JSON {type(row).__name__}, not an object with columns")
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    pa: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not readable as Parquet: {first_line(error)}") from error


def _read_csv(path: Path) -> Iterator[Row]:
    """The rows, by the names in the first line; a row with more or fewer cells is broken, and a name stands once."""
    pa: Any = import_module("pyarrow")
    content = path.read_bytes()
    try:
        table = _parse(content)
    except pa.ArrowInvalid as error:
        plain = _without_leading_blanks(path)
        try:
            table = _parse(plain)
        except pa.ArrowInvalid:
            raise UserError(f"{path} is not readable as CSV: {first_line(error)}") from error
    if content.count(b'"') % 2:
        _without_leading_blanks(path)  # Arrow reads an unclosed quote as one cell that ends with the file
    del content
    names = table.column_names
    duplicates = [name for number, name in enumerate(names) if name in names[:number]]
    if duplicates:
        raise UserError(f"{path} line 1 names the column {duplicates[0]!r} twice")
    for batch in table.to_batches(ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _parse(content: bytes) -> Any:
    pa: Any = import_module("pyarrow")
    arrow_csv: Any = import_module("pyarrow.csv")
    return arrow_csv.read_csv(
        pa.BufferReader(content),
        # One block for the whole file: quoted cells may hold line ends, and every row counts for the types.
        read_options=arrow_csv.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1)),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
    )


def read_cells(path: Path, *, skip_leading_blanks: bool = False) -> Iterator[tuple[list[str], int]]:
    """The cells of each row of a CSV file as text, none for an empty line, and the line where the row ends.

    OSError, UnicodeDecodeError or csv.Error from where on the file cannot be read.
    """
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True, skipinitialspace=skip_leading_blanks)
        for cells in rows:
            yield cells, rows.line_num


def _without_leading_blanks(path: Path) -> bytes:
    """The file as CSV without blanks at the start of cells; every row must have as many cells as the first."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    columns = None
    line = 1  # where the row begins: a quoted cell may hold line ends
    try:
        for cells, last_line in read_cells(path, skip_leading_blanks=True):
            columns = columns or len(cells)
            if cells and len(cells) != columns:
                start = ",".join(cells)[:SHOWN_CHARACTERS]
                raise UserError(
                    f"{path} line {line} has {len(cells)} cells, and line 1 names {columns} columns: {start}"
                )
            if cells:
                writer.writerow(cells)
            line = last_line + 1
    except csv.Error as error:
        raise UserError(f"{path} line {line} is not readable as CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not readable as CSV: its byte {error.start} is not UTF-8") from error
    return out.getvalue().encode()


# By the end of the file's name, the generator of its rows; UserError where the file or a row is broken.
READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
FILE_SUFFIXES = tuple(READERS)


def digest_of(paths: list[Path]) -> str:
    """SHA-256, in hexadecimal, of the content and format of some files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        digest.update(path.suffix.encode())
    return digest.hexdigest()
