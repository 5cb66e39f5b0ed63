"""RUN/checkpoints: a checkpoint appears by one rename once it is complete, and is removed only after a newer one."""

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from isotune.checkpoint.manifest import MANIFEST, InvalidCheckpoint, Manifest, verify
from isotune.io.files import sync_path
from isotune.run.run_lease import RunLease

_NAME = re.compile(r"step-(\d{8,})")
_STAGING = re.compile(r"\.step-\d{8,}\.tmp-.*")
_ASIDE = re.compile(r"\.(step-\d{8,})\.before")


def name_of(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class NewestValid:
    """The newest checkpoint that verifies, if any, and the newer ones that do not, each with the reason."""

    folder: Path | None
    manifest: Manifest | None
    skipped: tuple[tuple[Path, str], ...]


@dataclass(eq=False)
class CheckpointStore:
    """The checkpoints of one run. Only the main process changes anything here."""

    path: Path  # need not exist
    limit: int | None = None  # checkpoints to keep; None keeps all
    lease: RunLease | None = None  # None where no other process can write here

    def check_lease(self) -> None:
        """Raise Superseded where this attempt is stale and may no longer write."""
        if self.lease is not None:
            self.lease.check()

    def folders(self) -> list[Path]:
        """Every published checkpoint, valid or not, the oldest step first."""
        try:
            with os.scandir(self.path) as entries:
                found = [self.path / one.name for one in entries if _NAME.fullmatch(one.name) and one.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def newest_valid(self) -> NewestValid:
        """The newest checkpoint of which every byte matches its manifest; OSError where the file system fails."""
        skipped: list[tuple[Path, str]] = []
        for folder in reversed(self.folders()):
            try:
                return NewestValid(folder, verify(folder), tuple(skipped))
            except InvalidCheckpoint as why:
                skipped.append((folder, str(why)))
        return NewestValid(None, None, tuple(skipped))

    def clean(self) -> None:
        """Remove what a killed attempt left half written, and undo a replacement that it did not finish."""
        if not self.path.is_dir():
            return
        for path in list(self.path.iterdir()):
            if _STAGING.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif aside := _ASIDE.fullmatch(path.name):
                if (self.path / aside[1]).exists():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.rename(self.path / aside[1])

    def stage(self, step: int) -> Path:
        """Create a directory with a unique name to write a checkpoint into."""
        self.check_lease()
        self.path.mkdir(parents=True, exist_ok=True)
        staging = self._staging_area() / f".{name_of(step)}.tmp-{secrets.token_hex(4)}"
        staging.mkdir()
        return staging

    def publish(self, staging: Path, step: int) -> None:
        """Rename a complete and synced directory to its final name, and sync the rename."""
        folder = self.path / name_of(step)
        for path in (*(path for path in staging.rglob("*") if path.is_dir()), staging):
            sync_path(path)  # the names in it; the files were synced as they were written
        self.check_lease()
        aside = self.path / f".{folder.name}.before"
        if folder.exists():  # of an earlier attempt that went further than this one
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        try:
            staging.rename(folder)
        except FileNotFoundError:  # this attempt is stale: its directory was renamed, with `staging` in it
            if aside.exists() and not folder.exists():
                aside.rename(folder)
            raise
        sync_path(self.path)
        shutil.rmtree(aside, ignore_errors=True)

    def prune(self, newest: int, best: int | None) -> None:
        """Remove the oldest checkpoints beyond `limit`, but neither `newest`, just published, nor `best`."""
        if self.limit is None:
            return
        folders = self.folders()
        protected = {name_of(step) for step in (newest, best) if step is not None}
        spare = [folder for folder in folders if folder.name not in protected]
        # checkpoints after `newest` are of an earlier attempt that went further and were not valid: they go first
        spare.sort(key=lambda folder: (folder.name <= name_of(newest), folder.name))
        for folder in spare[: max(len(folders) - self.limit, 0)]:
            self._remove(folder)

    def remove_all(self) -> None:
        """Remove every checkpoint: the user asked for a new run."""
        for folder in self.folders():
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Rename a checkpoint before it is deleted, so that a kill leaves no partial one under its name."""
        removed = self._staging_area() / f".{folder.name}.tmp-removed"
        shutil.rmtree(removed, ignore_errors=True)
        try:
            folder.rename(removed)
        except FileNotFoundError:
            self.check_lease()
        shutil.rmtree(removed, ignore_errors=True)

    def _staging_area(self) -> Path:
        """Where unfinished directories go: out of reach for this attempt once it is stale."""
        return (self.lease and self.lease.folder) or self.path


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, valid or not."""
    return (folder / MANIFEST).is_file() or _NAME.fullmatch(folder.name) is not None
