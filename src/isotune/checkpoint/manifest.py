"""The manifest of a checkpoint: it is written last, and records the size and hash of every file."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from isotune.io.errors import shown
from isotune.io.files import write_synced
from isotune.io.reading import Unreadable, checked, read_json_object
from isotune.io.run_files import Whole

MANIFEST = "MANIFEST.json"
FORMAT = 1
BLOCK_BYTES = 2**22


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
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileRecord(path.relative_to(folder).as_posix(), size, digest.hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, without its files.

    Raises InvalidCheckpoint where there is none, it is broken, or this version does not know its format.
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
        raise InvalidCheckpoint(f"{MANIFEST} is broken: {reason}") from None
    files = tuple(FileRecord(**file) for file in content.pop("files"))
    return Manifest(**content, files=files)


def verify(folder: Path) -> Manifest:
    """Read every byte of a checkpoint; InvalidCheckpoint where something is missing, added or changed."""
    manifest = read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected_names = {file.name for file in manifest.files}
    if missing := sorted(expected_names - present):
        raise InvalidCheckpoint(f"{missing[0]} is missing")
    # torch.distributed.checkpoint reads every safetensors file of a directory
    if extra := sorted(name for name in present - expected_names if name.endswith(".safetensors")):
        raise InvalidCheckpoint(f"{extra[0]} does not belong to it")
    for expected in manifest.files:
        size = (folder / expected.name).stat().st_size
        if size != expected.bytes:
            raise InvalidCheckpoint(f"{expected.name} has {size} bytes and not {expected.bytes}")
    for expected in manifest.files:
        try:
            actual = record_file(folder, folder / expected.name)
        except OSError as error:
            raise InvalidCheckpoint(f"{expected.name} cannot be read: {error.strerror}") from error
        if actual.sha256 != expected.sha256:
            raise InvalidCheckpoint(f"{expected.name} is not what was written: its hash differs")
    return manifest


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
