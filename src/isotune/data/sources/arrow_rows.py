"""Reads rows from Arrow's tables: Parquet, Arrow IPC files and streams, and `datasets.Dataset`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from isotune.data.sources.text_files import open_seekable
from isotune.io.errors import UserError, first_line, shown
from isotune.io.reading import byte_fault

Row = dict[str, Any]

ROWS_AT_ONCE = 1_000
CELL_ERRORS = (OSError, ValueError, OverflowError)  # the last two of a date that Python does not have
IPC_FILE = b"ARROW1"  # how an IPC file begins; a stream begins otherwise


def read_dataset(dataset: Any) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`; UserError where its files are broken."""
    arrow: Any = import_module("pyarrow")
    files = ", ".join(str(file["filename"]) for file in dataset.cache_files) or "the data set"
    try:
        yield from _rows(map(_checked, dataset.with_format("arrow").iter(ROWS_AT_ONCE)))
    except (arrow.ArrowException, *CELL_ERRORS) as error:
        raise UserError(f"{files} is not readable as Arrow: {first_line(error)}") from error
    except _Fault as fault:
        raise UserError(f"{files}: {fault}") from fault.__cause__


def read_parquet(path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of a Parquet file; UserError where it is none."""
    parquet: Any = import_module("pyarrow.parquet")

    def batches(file: Any) -> Iterator[Any]:
        with parquet.ParquetFile(file) as table:
            yield from map(_checked, table.iter_batches(ROWS_AT_ONCE))

    return _read(path, "Parquet", batches)


def read_arrow(path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of an Arrow IPC file or stream, as `datasets` keeps them; UserError where it is none."""
    ipc: Any = import_module("pyarrow.ipc")

    def batches(file: Any) -> Iterator[Any]:
        start = file.read(len(IPC_FILE))
        file.seek(0)
        if start == IPC_FILE:
            table = ipc.open_file(file)
            found = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            found = iter(ipc.open_stream(file))
        for batch in map(_checked, found):  # once: the check of a slice passes over all that its batch holds
            for first in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(first, ROWS_AT_ONCE)

    return _read(path, "Arrow", batches)


def _read(path: Path, kind: str, batches: Callable[[Any], Iterator[Any]]) -> Iterator[Row]:
    arrow: Any = import_module("pyarrow")
    opened: AbstractContextManager[Any] = open_seekable(path)
    with opened as file:
        try:
            yield from _rows(batches(file))
        except (arrow.ArrowException, *CELL_ERRORS) as error:
            raise UserError(f"{path} is not readable as {kind}: {first_line(error)}") from error
        except _Fault as fault:
            raise UserError(f"{path} {fault}") from fault.__cause__


class _Fault(UserError):
    """What is wrong with a table that Arrow reads: the sentence, without the file's name."""


def _rows(batches: Iterator[Any]) -> Iterator[Row]:
    """Rows of batches, with texts and numbers as every other format has them.

    Binary cells are texts where they are UTF-8: not every program marks a column as such. Decimals without
    a fraction are whole numbers; others keep their digits.
    """
    count = 0
    for batch in batches:
        names: list[str] = batch.schema.names
        if len(set(names)) < len(names):
            raise _Fault(f"has two columns of the name {shown(max(names, key=names.count))}")
        try:
            rows: list[Row] = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise _not_utf8(batch, count) from error
        count += len(rows)
        for name in (field.name for field in batch.schema if _is_written_otherwise(field.type)):
            for row in rows:
                row[name] = _plain(row[name])
        if any(_has_fields(field.type) for field in batch.schema):
            for row in rows:
                yield {name: without_nulls(value) for name, value in row.items()}
        else:
            yield from rows


def _checked(batch: Any) -> Any:
    """The batch; ArrowInvalid where its texts or lists are said to lie outside the data, where Arrow would read."""
    arrow: Any = import_module("pyarrow")
    for column in batch.columns:
        for array in getattr(column, "chunks", [column]):  # of a table; a batch has arrays
            try:
                array.validate(full=True)
            except arrow.ArrowInvalid as error:
                if "UTF8" not in str(error):  # a text that is none is named by its row
                    raise
    return batch


def _is_written_otherwise(kind: Any) -> bool:
    types: Any = import_module("pyarrow.types")
    is_binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return is_binary or (types.is_decimal(kind) and kind.scale <= 0)


def _plain(cell: Any) -> Any:
    """The text in a binary cell, or the whole number in a decimal one; the cell as it is where it holds none."""
    if isinstance(cell, Decimal):
        return int(cell)
    try:
        return cell.decode() if isinstance(cell, bytes) else cell
    except UnicodeDecodeError:
        return cell


def _not_utf8(batch: Any, rows_before: int) -> _Fault:
    """The error of a batch that holds a text which is none, by its row and column."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for number, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                return _Fault(f"row {rows_before + number + 1}, column {name!r}, {byte_fault(byte)}")
    raise AssertionError("a batch cannot be read though each of its cells can")


def _has_fields(kind: Any) -> bool:
    """Whether values of an Arrow type hold structs."""
    types: Any = import_module("pyarrow.types")
    return types.is_struct(kind) or any(_has_fields(kind.field(n).type) for n in range(kind.num_fields))


def without_nulls(value: Any) -> Any:
    """A value whose structs lack the fields that are null.

    All structs of an Arrow column have the same fields, so a field that some of them lacked is null in those.
    """
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        return {name: without_nulls(own) for name, own in fields.items() if own is not None}
    return [without_nulls(item) for item in cast(list[Any], value)] if isinstance(value, list) else value
