"""Opens data files: decompressed, and decoded from UTF-8, or from UTF-16 or UTF-32 with a byte order mark."""

import codecs
import io
import re
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from isotune.io.errors import UserError, first_line
from isotune.io.formats import compression_of
from isotune.io.reading import byte_fault, kind_of_file

# The longest mark first: that of UTF-32 begins as that of UTF-16 does.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# how files begin that somebody has renamed
OTHER_CONTENT = {
    b"\x1f\x8b": "compressed by gzip (.gz)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd (.zst)",
    b"PK\x03\x04": "a zip archive, such as a spreadsheet's",
    b"PAR1": "Parquet (.parquet)",
}
FORMULA_STARTS = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
)  # the last four are wide
_UNDECODED = re.compile("[\udc80-\udcff]")


@contextmanager
def open_bytes(path: Path) -> Generator[BinaryIO]:
    """The content of a file, decompressed as it is read; UserError where it cannot be read."""
    compression = compression_of(path)
    try:
        if (kind := kind_of_file(path.stat().st_mode)) != "a file":  # a pipe would wait for its other end
            raise UserError(f"{path} is {kind}, not a file")
        if compression is None:
            with path.open("rb") as file:
                yield file
        else:
            arrow: Any = import_module("pyarrow")
            with arrow.input_stream(str(path), compression=compression) as stream:
                yield io.BufferedReader(stream)  # type: ignore[type-var]  (Arrow's files have no types)
    except OSError as error:
        broken = f"is not readable as {compression}" if compression else "cannot be read"
        raise UserError(f"{path} {broken}: {error.strerror or first_line(error)}") from error


@contextmanager
def open_seekable(path: Path) -> Generator[Any]:
    """The same for a reader that needs to jump: a compressed file is unpacked into a temporary one."""
    with open_bytes(path) as file:
        if compression_of(path) is None:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked, 2**20)
            unpacked.seek(0)
            yield unpacked


@contextmanager
def open_text(path: Path) -> Generator[TextIO]:
    """The text of a file with its line ends as they are.

    A byte that is not UTF-8 becomes a character that `undecoded` finds, so that whoever knows its line can name it.
    """
    with open_bytes(path) as file:
        buffered = cast(io.BufferedReader, file if isinstance(file, io.BufferedReader) else io.BufferedReader(file))  # type: ignore[type-var]
        start = buffered.peek(4)[:4]
        if kind := next((kind for mark, kind in OTHER_CONTENT.items() if start.startswith(mark)), None):
            raise UserError(f"{path} is no text but {kind}: its name has to end as that does")
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
        if encoding == "utf-8" and b"\0" in start:
            raise UserError(f"{path} is not UTF-8: it is binary, or UTF-16 without a byte order mark; save it as UTF-8")
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        try:
            yield io.TextIOWrapper(buffered, encoding, errors, newline="")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not readable as {encoding.upper()}: {error.reason}") from error


def read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Each line of a file as a row with the column `text`, without its end; an empty line is a row too."""
    notes.append(f"{path.name}: each line is a row, in the column 'text'")
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if fault := undecoded(line):
                raise UserError(f"{path} line {number} {fault}")
            yield {"text": line.rstrip("\r\n")}


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet would compute a text of a CSV file rather than show it; a number is what it is."""
    if not cell.startswith(FORMULA_STARTS):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def undecoded(text: str) -> str | None:
    """What is wrong with a text that holds bytes that are not UTF-8, as the end of a sentence; None where none is."""
    place = undecoded_at(text)
    return None if place is None else byte_fault(ord(text[place]) - 0xDC00)


def undecoded_at(text: str) -> int | None:
    """The first character of a text that stands for a byte that is not UTF-8; None where there is none."""
    found = None if text.isascii() else _UNDECODED.search(text)
    return found and found.start()
