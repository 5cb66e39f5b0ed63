"""Reads rows from Arrow's tables: Parquet, Arrow IPC files and streams, and `datasets.Dataset`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from isotune.data.sources.text_files import open_seekable
from isotune.io.errors import UserError, first_line

Row = dict[str, Any]

ROWS_AT_ONCE = 1_000
IPC_FILE = b"ARROW1"  # how an IPC file begins; a stream begins otherwise


def read_dataset(dataset: Any) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`."""
    yield from _rows(dataset.with_format("arrow").iter(ROWS_AT_ONCE))


def read_parquet(path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of a Parquet file; UserError where it is none."""
    parquet: Any = import_module("pyarrow.parquet")

    def batches(file: Any) -> Iterator[Any]:
        with parquet.ParquetFile(file) as table:
            yield from table.iter_batches(ROWS_AT_ONCE)

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
        for batch in found:
            for first in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(first, ROWS_AT_ONCE)

    return _read(path, "Arrow", batches)


def _read(path: Path, kind: str, batches: Callable[[Any], Iterator[Any]]) -> Iterator[Row]:
    arrow: Any = import_module("pyarrow")
    opened: AbstractContextManager[Any] = open_seekable(path)
    with opened as file:
        try:
            yield from _rows(batches(file))
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not readable as {kind}: {first_line(error)}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} holds a text that is not UTF-8: {error.reason}") from error


def _rows(batches: Iterator[Any]) -> Iterator[Row]:
    for batch in batches:
        rows: list[Row] = batch.to_pylist()
        if any(_has_fields(field.type) for field in batch.schema):
            for row in rows:
                yield {name: without_nulls(value) for name, value in row.items()}
        else:
            yield from rows


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
