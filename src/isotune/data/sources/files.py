"""Which reader reads a file, by the end of its name, and the digest of what files hold."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from isotune.data.sources.arrow_rows import read_arrow, read_parquet
from isotune.data.sources.csv_rows import CsvFile
from isotune.data.sources.json_rows import read_json
from isotune.data.sources.text_files import read_lines
from isotune.io.errors import UserError
from isotune.io.files import digest_of_file
from isotune.io.formats import PLAIN_TEXT, format_of

Row = dict[str, Any]
Reader = Callable[[list[str]], Iterator[Row]]  # given the list that takes what was guessed or left out

_READERS = {
    ".jsonl": read_json, ".json": read_json, ".parquet": read_parquet, ".arrow": read_arrow, PLAIN_TEXT: read_lines
}  # fmt: skip
CSV_FORMATS = (".csv", ".tsv")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CSV_VERSION = "cells are text"  # in the digest: the same file once gave numbers


class BorrowedColumns(tuple[str, ...]):
    """Names of columns that were given for another file: they count where a CSV file does not name its own."""


def columns_of(path: Path, columns: Sequence[str] | None) -> Sequence[str] | None:
    """The names among `columns` that a file needs: all, or none where they are borrowed and the file has names."""
    if not isinstance(columns, BorrowedColumns):
        return columns
    is_needed = format_of(path) in CSV_FORMATS and not CsvFile(path).has_names(columns)
    return columns if is_needed else None


def reader_of(path: Path, columns: Sequence[str] | None) -> Reader:
    """The reader of one file; `columns` name those of a CSV file whose first line is a row."""
    suffix = format_of(path)
    if suffix in CSV_FORMATS:
        return CsvFile(path, columns).rows
    return lambda notes: _READERS[suffix or ""](path, notes)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS has in place of a large one."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def digest_of(paths: list[Path], columns: Sequence[str] | None = None) -> str:
    """SHA-256, in hexadecimal, of the content and format of some files, and the names that were given to columns."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(digest_of_file(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        suffix = format_of(path) or path.suffix
        digest.update(suffix.encode())
        if suffix in CSV_FORMATS:
            digest.update(repr((CSV_VERSION, columns and list(columns))).encode())
    return digest.hexdigest()
