"""Prepared documents on disk, written once however many processes start at once and however they are killed.

    $ISOTUNE_CACHE/prepared/FINGERPRINT/   NAME.npy for each array, such as input_ids, starts, labels;  meta.json
    $ISOTUNE_CACHE/prepared/FINGERPRINT.lock
    $ISOTUNE_CACHE/prepared/FINGERPRINT.partial-*/      being written; the next holder of the lock removes it

An entry appears by one rename. meta.json holds a digest of every array, so an entry that was damaged, or that a power
cut kept from reaching the disk, is noticed and written again.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from isotune.io.cache_root import cache_root, disk_errors_named
from isotune.io.locks import held
from isotune.io.reading import parse_json, read_text
from isotune.io.run_files import MAX_LINES_BYTES

Content = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays by name, and counts that JSON can hold
Build = Callable[[Path], Content]  # given the folder that becomes the entry


def cache_folder() -> Path:
    """Where prepared data lies: `$ISOTUNE_CACHE/prepared`, by default `~/.cache/isotune/prepared`."""
    return cache_root() / "prepared"


def load_or_build(fingerprint: str, build: Build) -> Content:
    """The entry of this fingerprint, built by exactly one of the processes that ask for it; arrays mapped from disk.

    An array that `build` has written to the folder, as NAME.npy, is taken as it lies there. UserError where the folder
    cannot be written, the disk has no room, or the process that builds the entry hangs.
    """
    folder = cache_folder()
    entry = folder / fingerprint
    if content := _load(entry):
        return content
    with held(folder / f"{fingerprint}.lock"):
        content = _load(entry)
        if content is None:
            # Nobody else writes while the lock is held: a partial entry here is of a process that was killed.
            for leftover in [*folder.glob(f"{fingerprint}.partial-*"), entry]:
                shutil.rmtree(leftover, ignore_errors=True)
            _build(entry, build)
            content = _load(entry)
    assert content is not None, f"{entry} cannot be read back"
    return content


def _build(entry: Path, build: Build) -> None:
    """Make an entry so that it is there as a whole or not at all."""
    partial = entry.with_name(f"{entry.name}.partial-{uuid.uuid4().hex}")
    with disk_errors_named(entry.parent):
        partial.mkdir()
    try:
        arrays, counts = build(partial)
        with disk_errors_named(entry.parent):
            places = {name: partial / f"{name}.npy" for name in arrays}
            digests = {
                name: _digest(place) if place.exists() else write_array(place, arrays[name])
                for name, place in places.items()
            }
            (partial / "meta.json").write_text(json.dumps({"sha256": digests, "counts": counts}, indent=1), "utf-8")
            partial.rename(entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _load(entry: Path) -> Content | None:
    """An entry's content with the arrays mapped from disk, or None where it is absent or damaged."""
    try:
        meta = parse_json(read_text(entry / "meta.json", MAX_LINES_BYTES))
        if any(_digest(entry / f"{name}.npy") != expected for name, expected in meta["sha256"].items()):
            return None
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in meta["sha256"]}
        return arrays, meta["counts"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_array(path: Path, array: np.ndarray) -> str:
    """Write one array, and return the digest of the file."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
