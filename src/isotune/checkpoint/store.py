"""RUN/checkpoints: a folder appears there by one rename when it is whole, and goes only when a later one is valid."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isotune.checkpoint.manifest import InvalidCheckpoint, Manifest, verify
from isotune.run.run_lease import RunLease

_NAME = re.compile(r"step-(\d{8,})")
_STAGING = re.compile(r"\.step-\d{8,}\.tmp-.*")
_ASIDE = re.compile(r"\.(step-\d{8,})\.before")


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Choice:
    """The newest checkpoint that verifies, if any, and why newer ones were passed over."""

    folder: Path | None
    manifest: Manifest | None
    passed_over: tuple[tuple[Path, str], ...]


class CheckpointStore:
    """The checkpoints of one run. Only the main process changes anything here.

    Attributes:
        path: RUN/checkpoints, which need not exist.
        limit: how many to keep, or None for all.
        fence: who may change anything here; None where nobody else can be.
    """

    def __init__(self, path: Path, limit: int | None = None, fence: RunLease | None = None) -> None:
        self.path = path
        self.limit = limit
        self.fence = fence

    def check_fence(self) -> None:
        """Raises:
        Superseded: another life has taken over, and this one changes nothing any more.
        """
        if self.fence is not None:
            self.fence.check()

    def folders(self) -> list[Path]:
        """Every published checkpoint, whole or not, from the oldest step to the newest."""
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def newest_valid(self) -> Choice:
        """The newest checkpoint whose every byte is what its manifest says."""
        passed_over = []
        for folder in reversed(self.folders()):
            try:
                return Choice(folder, verify(folder), tuple(passed_over))
            except InvalidCheckpoint as why:
                passed_over.append((folder, str(why)))
        return Choice(None, None, tuple(passed_over))

    def clean(self) -> None:
        """Remove what a killed life left half written, and undo a replacement that it did not finish."""
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
        """Make the folder that a checkpoint is written into; its name is nobody else's."""
        self.check_fence()
        self.path.mkdir(parents=True, exist_ok=True)
        place = (self.fence and self.fence.folder) or self.path
        staging = place / f".{name_of(step)}.tmp-{secrets.token_hex(4)}"
        staging.mkdir()
        return staging

    def publish(self, staging: Path, step: int) -> Path:
        """Give a folder that is whole and synced its name, by one rename that is itself synced."""
        folder = self.path / name_of(step)
        sync_tree(staging)
        self.check_fence()
        aside = self.path / f".{folder.name}.before"
        if folder.exists():  # of an earlier life that went further than this one has
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        try:
            staging.rename(folder)
        except FileNotFoundError:  # the folder of this life was taken away, and all in it
            if aside.exists() and not folder.exists():
                aside.rename(folder)
            raise
        sync_entry(self.path)
        shutil.rmtree(aside, ignore_errors=True)
        return folder

    def prune(self, newest: int, best: int | None) -> list[Path]:
        """Remove the oldest beyond `limit`. What is kept: `newest`, which was just published, and `best`.

        Returns:
            what was removed.
        """
        if self.limit is None:
            return []
        folders = self.folders()
        protected = {name_of(step) for step in (newest, best) if step is not None}
        spare = [folder for folder in folders if folder.name not in protected]
        # those beyond the newest are of a life that went further and could not be resumed: they go first
        spare.sort(key=lambda folder: (folder.name <= name_of(newest), folder.name))
        room = max(self.limit - (len(folders) - len(spare)), 0)
        doomed = spare[: max(len(spare) - room, 0)]
        for folder in doomed:
            self._remove(folder)
        return doomed

    def forget_all(self) -> None:
        """Remove every checkpoint: the user said that the run begins anew."""
        for folder in self.folders():
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Take a checkpoint's name away first, so that a kill meanwhile leaves no half of one under it."""
        place = (self.fence and self.fence.folder) or self.path
        doomed = place / f".{folder.name}.tmp-removed"
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            self.check_fence()
        shutil.rmtree(doomed, ignore_errors=True)


def find_checkpoint(folder: Path) -> Manifest:
    """The verified manifest of a checkpoint that the user named.

    Raises:
        InvalidCheckpoint: it is none, or does not verify.
    """
    if not folder.is_dir():
        raise InvalidCheckpoint("there is no such folder")
    return verify(folder)


def sync_tree(folder: Path) -> None:
    """Force every folder below `folder`, and itself, to the disk; its files were synced as they were written."""
    for path in _folders(folder):
        sync_entry(path)


def _folders(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_dir())
    yield folder


def sync_entry(folder: Path) -> None:
    """Force the names in one folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
