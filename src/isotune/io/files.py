"""Digests of files, and atomic writes.

A file is written beside its place and renamed into it, so a reader never finds half of it.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DIGESTS: dict[tuple[str, int, int, int], bytes] = {}


def digest_of_file(path: Path) -> bytes:
    """SHA-256 of a file's content; OSError where it cannot be read. A process reads a file that stays as it is once."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = (os.path.abspath(path), status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in _DIGESTS:
            _DIGESTS[key] = hashlib.file_digest(file, "sha256").digest()
    return _DIGESTS[key]


@contextmanager
def replacing(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends; after an error it is removed, and `path` stays.

    It is `staging`, on the same file system; by default `.NAME.tmp` beside `path`, which suits a single writer.
    """
    staging = staging or path.with_name(f".{path.name}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            staging.unlink()  # in a run of somebody else's it may be a link, and its target would be overwritten
        yield staging
        staging.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # what the user knows; a write alone names no file at all
        with contextlib.suppress(OSError):
            staging.unlink()
        raise


def set_aside(folder: Path) -> Path:
    """Rename a folder, where there is one, so that another can take its name; returns where it is then."""
    before = folder.with_name(f"{folder.name}.before")
    if folder.exists():
        remove_folder(before)
        folder.rename(before)
    return before


def remove_folder(path: Path) -> None:
    """Remove what has a folder's name, as far as possible: of a link the link alone, which `rmtree` refuses."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and force it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str, staging: Path | None = None) -> None:
    """Replace a file by `text`, which has reached the disk before it takes the file name; see `replacing`."""
    with replacing(path, staging) as unfinished:
        write_synced(unfinished, text)
