"""Prepared documents on disk, written once however many processes start at once and however they are killed.

    $ISOTUNE_CACHE/prepared/FINGERPRINT/   input_ids.npy  supervised.npy  starts.npy  source_rows.npy  meta.json
                                           (what has other arrays, such as labels, has their files)
    $ISOTUNE_CACHE/prepared/FINGERPRINT.lock
    $ISOTUNE_CACHE/prepared/FINGERPRINT.partial-*/      being written; whoever next holds the lock removes it

An entry appears by one rename, after its files have reached the disk. meta.json holds a digest of every array, so an
entry that was damaged later is noticed and written anew.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from isotune.data.documents import Documents
from isotune.io.errors import UserError
from isotune.io.files import write_synced

NO_ROOM = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "has reached your quota",
    errno.EROFS: "is read-only",
    errno.EFBIG: "takes no file so large",
}

Kind = TypeVar("Kind")  # a dataclass of arrays
Content = tuple[Kind, dict[str, Any]]


def cache_folder() -> Path:
    """Where prepared data lies: `$ISOTUNE_CACHE/prepared`, by default `~/.cache/isotune/prepared`."""
    root = os.environ.get("ISOTUNE_CACHE") or Path.home() / ".cache" / "isotune"
    return Path(root).expanduser() / "prepared"


def load_or_build(
    fingerprint: str,
    build: Callable[[], Content[Kind]],
    kind: type[Kind] = Documents,  # type: ignore[assignment]  (what `build` gives by default)
) -> Content[Kind]:
    """The entry of this fingerprint, built by exactly one of the processes that ask for it.

    Args:
        build: gives the documents and whatever JSON-ready counts belong to them.
        kind: the dataclass of arrays that `build` gives.

    Returns:
        The documents, mapped from disk, and the counts.

    Raises:
        UserError: the folder cannot be written, or the disk has no room.
    """
    folder = cache_folder()
    entry = folder / fingerprint
    found = load(entry, kind)
    if found is not None:
        return found
    lock = FileLock(folder / f"{fingerprint}.lock")
    with disk_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        found = load(entry, kind)
        if found is None:
            # Nobody else writes while the lock is held: what is half written here was killed.
            for leftover in [*folder.glob(f"{fingerprint}.partial-*"), entry]:
                shutil.rmtree(leftover, ignore_errors=True)
            documents, counts = build()
            with disk_errors_named(folder):
                save(entry, documents, counts)
            found = load(entry, kind)
    finally:
        lock.release()
    assert found is not None, f"{entry} cannot be read back"
    return found


def save(entry: Path, documents: Any, counts: dict[str, Any]) -> None:
    """Write an entry so that it is there as a whole or not at all."""
    partial = entry.with_name(f"{entry.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        digests = {
            name: write_array(partial / f"{name}.npy", getattr(documents, name)) for name in _arrays(type(documents))
        }
        meta = json.dumps({"sha256": digests, "counts": counts}, indent=1)
        write_synced(partial / "meta.json", meta)
        _sync_folder(partial)
        partial.rename(entry)
        _sync_folder(entry.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load(entry: Path, kind: type[Kind]) -> Content[Kind] | None:
    """An entry's content with the arrays mapped from disk, or None where it is absent or damaged."""
    try:
        meta = json.loads((entry / "meta.json").read_text("utf-8"))
        names = _arrays(kind)
        for name in names:
            with (entry / f"{name}.npy").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != meta["sha256"][name]:
                    return None
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        return kind(**arrays), meta["counts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _arrays(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def write_array(path: Path, array: np.ndarray) -> str:
    """Write one array, wait until the disk has it, and return the digest of the file."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """Turn a disk's refusal into the sentence that names the folder and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            reason = f"the disk of {folder} {NO_ROOM[error.errno]}"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            reason = f"the folder {folder} cannot be written ({error.strerror})"
        else:
            raise
        raise UserError(f"{reason}: make room or set ISOTUNE_CACHE to another folder") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
