"""The manifest of a checkpoint: it is written last, and records the size and hash of every file."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from isotune.io.errors import UserError, shown
from isotune.io.files import sync_path, write_synced
from isotune.io.reading import Unreadable, checked, read_json_object
from isotune.io.run_files import Whole

MANIFEST = "MANIFEST.json"
FORMAT = 1
BLOCK_BYTES = 2**22
# errors by which something else lies where a file should; any other is the file system's, and may pass
DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class InvalidCheckpoint(Exception):
    """The directory cannot be resumed from; the message is the reason, without the directory's name."""


@dataclass(frozen=True)
class FileRecord:
    """A file of the checkpoint: its path within the directory, its size and its hash."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of MANIFEST.json."""

    step: int  # optimizer updates done
    world_size: int  # this, the engine and the versions may differ where it is read
    engine: str
    recipe_fingerprint: str
    recipe: dict[str, Any]  # the keys that change the result
    data_fingerprints: dict[str, str]  # of the prepared data, by role
    versions: dict[str, str]
    best_step: int | None  # best evaluation so far, where the run tracks one
    best_metric: float | None
    contents: dict[str, str] = field(default_factory=dict[str, str])  # digests of what `recipe` names, by key
    files: tuple[FileRecord, ...] = ()  # every file but the manifest
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write MANIFEST.json with a digest of itself, and fsync it."""
        content = asdict(self)
        content["digest"] = _digest(content)
        write_synced(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


class _File(TypedDict):
    name: str
    bytes: Whole
    sha256: str


@with_config(ConfigDict(extra="forbid"))
class _Content(TypedDict):
    """What MANIFEST.json holds: every field of Manifest."""

    step: Whole
    world_size: Whole
    engine: str
    recipe_fingerprint: str
    recipe: dict[str, Any]
    data_fingerprints: dict[str, str]
    versions: dict[str, str]
    best_step: Whole | None
    best_metric: float | None
    contents: NotRequired[dict[str, str]]  # of a version that recorded none
    files: list[_File]
    format: Whole


_SCHEMA = TypeAdapter(_Content)


def record_file(folder: Path, path: Path) -> FileRecord:
    """fsync a written file, read it back, and return its size and hash."""
    sync_path(path)
    return _read_back(folder, path)


def _read_back(folder: Path, path: Path) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileRecord(path.relative_to(folder).as_posix(), size, digest.hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, without its files.

    Raises InvalidCheckpoint where there is none, it is broken, or this version does not know its format, and OSError
    where the file system fails: the checkpoint may be valid, and must not be passed over for an older one.
    """
    try:
        content: dict[str, Any] = read_json_object(folder / MANIFEST)
        if "digest" not in content:
            raise Unreadable("it has no digest")
        digest = content.pop("digest")
        if content.get("format") != FORMAT:
            raise InvalidCheckpoint(f"its format is {shown(content.get('format'))}, and this version reads {FORMAT}")
        if digest != _digest(content):
            raise InvalidCheckpoint(f"{MANIFEST} was changed after it was written")
        checked(content, _SCHEMA)
    except FileNotFoundError:
        raise InvalidCheckpoint(f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder") from None
    except Unreadable as reason:
        if isinstance(reason.__cause__, OSError):
            with _damage(folder, MANIFEST):
                raise reason.__cause__ from None
        raise InvalidCheckpoint(f"{MANIFEST} is broken: {reason}") from None
    files = tuple(FileRecord(**file) for file in content.pop("files"))
    return Manifest(**content, files=files)


def verify(folder: Path) -> Manifest:
    """Read every byte of a checkpoint; InvalidCheckpoint where something is missing, added or changed.

    OSError where the file system fails, as in `read_manifest`.
    """
    manifest = read_manifest(folder)
    present = _files_in(folder)
    expected_names = {file.name for file in manifest.files}
    if missing := sorted(expected_names - present):
        raise InvalidCheckpoint(f"{missing[0]} is missing")
    # torch.distributed.checkpoint reads every safetensors file of a directory
    if extra := sorted(name for name in present - expected_names if name.endswith(".safetensors")):
        raise InvalidCheckpoint(f"{extra[0]} does not belong to it")
    for expected in manifest.files:
        with _damage(folder, expected.name):
            size = (folder / expected.name).stat().st_size
        if size != expected.bytes:
            raise InvalidCheckpoint(f"{expected.name} has {size} bytes and not {expected.bytes}")
    for expected in manifest.files:
        with _damage(folder, expected.name):
            actual = _read_back(folder, folder / expected.name)
        if actual.sha256 != expected.sha256:
            raise InvalidCheckpoint(f"{expected.name} is not what was written: its hash differs")
    return manifest


def manifest_of(folder: Path, read: Callable[[Path], Manifest], asked_by: str = "") -> Manifest:
    """The manifest of the checkpoint that somebody asks for; UserError where it is not valid or cannot be read."""
    try:
        return read(folder)
    except InvalidCheckpoint as why:
        raise UserError(f"{asked_by}{folder} is not a valid checkpoint: {why}") from why
    except OSError as error:
        raise cannot_be_read(folder, error, asked_by) from error


def cannot_be_read(place: Path, error: OSError, asked_by: str = "") -> UserError:
    """The sentence of a file system that fails while checkpoints are read."""
    return UserError(f"{asked_by}{error.filename or place} cannot be read: {error.strerror}; run again when it can")


def _files_in(folder: Path) -> set[str]:
    """The names of all files below a folder; OSError, unlike with `rglob` and `is_file`, where that is not known."""

    def fail(error: OSError) -> None:
        raise error

    names: set[str] = set()
    for place, _, files in os.walk(folder, onerror=fail):
        for path in (Path(place) / file for file in files):
            try:
                if stat.S_ISREG(path.stat().st_mode):
                    names.add(path.relative_to(folder).as_posix())
            except OSError as error:  # a link that leads nowhere is no file
                if error.errno not in DAMAGE:
                    raise
    return names


@contextlib.contextmanager
def _damage(folder: Path, name: str) -> Generator[None]:
    """An error by which a file is not there becomes InvalidCheckpoint; another one is named after the file."""
    try:
        yield
    except OSError as error:
        if error.errno in DAMAGE:
            raise InvalidCheckpoint(f"{name} cannot be read: {error.strerror}") from error
        error.filename = error.filename or str(folder / name)
        raise


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
