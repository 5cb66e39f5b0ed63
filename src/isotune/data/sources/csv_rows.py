"""Reads CSV files with a type for each column; errors name the line of the broken row.

Arrow reads what RFC 4180 allows. Real files have a blank before a quoted cell (`"Buddha", "I want ..."`), which makes
the quotes text and every comma inside a new cell. Where Arrow refuses a file, the blanks at the start of cells are
removed and the file is read again. An error names whatever is still broken.
"""

import csv
import io
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from isotune.io.errors import UserError

SHOWN_CHARACTERS = 60


def read_csv(path: Path, rows_at_once: int) -> Iterator[dict[str, Any]]:
    """The rows of a file, by the names in its first line.

    Raises:
        UserError: a row has more or fewer cells than the first, a quote is not closed, a name stands twice, or the
            file is not UTF-8.
    """
    pa: Any = import_module("pyarrow")
    try:
        table = _parse(path)
    except pa.ArrowInvalid as error:
        plain = _without_leading_blanks(path)
        try:
            table = _parse(io.BytesIO(plain))
        except pa.ArrowInvalid:
            raise UserError(f"{path} is not readable as CSV: {str(error).splitlines()[0]}") from error
    if _has_odd_quotes(path):
        _without_leading_blanks(path)  # Arrow reads an unclosed quote as one cell that ends with the file
    names = table.column_names
    duplicates = [name for number, name in enumerate(names) if name in names[:number]]
    if duplicates:
        raise UserError(f"{path} line 1 names the column {duplicates[0]!r} twice")
    for batch in table.to_batches(rows_at_once):
        yield from batch.to_pylist()


def _parse(file: Any) -> Any:
    arrow_csv: Any = import_module("pyarrow.csv")
    # One block for the whole file: quoted cells may hold line ends, and every row counts for the types.
    size = file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
    return arrow_csv.read_csv(
        file,
        read_options=arrow_csv.ReadOptions(block_size=min(size + 1, 2**31 - 1)),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
    )


def _has_odd_quotes(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(sum(block.count(b'"') for block in iter(lambda: file.read(2**24), b"")) % 2)


def _without_leading_blanks(path: Path) -> bytes:
    """The file as CSV without blanks at the start of cells; every row must have as many cells as the first."""
    csv.field_size_limit(sys.maxsize)
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_MINIMAL)
    columns = None
    line = 1  # where the row begins: a quoted cell may hold line ends
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            for cells in reader:
                columns = columns or len(cells)
                if cells and len(cells) != columns:
                    start = ",".join(cells)[:SHOWN_CHARACTERS]
                    raise UserError(
                        f"{path} line {line} has {len(cells)} cells, and line 1 names {columns} columns: {start}"
                    )
                if cells:
                    writer.writerow(cells)
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {line} is not readable as CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not readable as CSV: its byte {error.start} is not UTF-8") from error
    return out.getvalue().encode()
