"""Checkpoints are written behind training's back: it waits for the copy to host memory and for nothing else.

A thread of each rank writes, syncs and hashes what the rank owns, over a process group of its own; rank 0 then
publishes. Whatever goes wrong on any rank is known to all of them, and is said at the end of the next step.
"""

import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from isotune.checkpoint.flat_tensors import FlatTensor, write_tensors, written_by
from isotune.checkpoint.manifest import FileRecord, Manifest, record_file
from isotune.checkpoint.store import CheckpointStore
from isotune.io.errors import RunFault, UserError
from isotune.io.files import write_synced

TENSORS = "tensors"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Snapshot:
    """The state at the end of a step, in memory that training does not touch.

    Attributes:
        tensors: this rank's slices, on the CPU; every rank has the same names.
        texts: the other files by name; only rank 0's are written.
        manifest: without its files.
    """

    tensors: Mapping[str, FlatTensor]
    texts: Mapping[str, str]
    manifest: Manifest


class CheckpointWriter:
    """Writes one snapshot after the other; every rank has one and calls it at the same steps.

    Args:
        store: where checkpoints go.
        on_published: called on rank 0, in the thread, with each checkpoint that has become valid.
    """

    def __init__(self, store: CheckpointStore, on_published: Callable[[Path, Manifest], None]) -> None:
        self.store = store
        self.on_published = on_published
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        # its own group: the thread's messages must not meet those of training
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether this rank's thread has ended with an error that nobody has heard of yet."""
        return self._error is not None

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write, after what is still being written.

        Raises:
            UserError, RunFault: the one before could not be written.
        """
        self.wait()
        # a daemon: when the process must go, half a checkpoint is no reason to stay
        self._thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            UserError: no room, or no permission; the same on every rank.
            RunFault: anything else, such as another life that has taken over.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except (UserError, RunFault) as known:
            self._error = known
        except BaseException as unknown:
            self._error = RunFault(f"the checkpoint of step {snapshot.manifest.step} was not written: {unknown!r}")

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.manifest.step
        staging: Path | None = None
        try:
            staging = Path(self._on_main(lambda: str(self.store.stage(step))))
            self._on_all(lambda: write_tensors(staging / TENSORS, snapshot.tensors, self.group))
            records = self._on_all(lambda: self._record_own(staging))
            self._on_main(lambda: self._publish(staging, snapshot, [r for of_rank in records for r in of_rank]))
        except _Failure as failure:
            if staging is not None and self.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            self.store.check_fence()
            raise failure.as_known(self.store.path, step) from failure

    def _record_own(self, staging: Path) -> list[FileRecord]:
        return [record_file(staging, path) for path in written_by(staging / TENSORS, self.rank)]

    def _publish(self, staging: Path, snapshot: Snapshot, files: list[FileRecord]) -> None:
        for name, text in snapshot.texts.items():
            write_synced(staging / name, text)
            files.append(record_file(staging, staging / name))
        manifest = dataclasses.replace(snapshot.manifest, files=tuple(files))
        manifest.write(staging)
        folder = self.store.publish(staging, manifest.step)
        self.on_published(folder, manifest)
        self.store.prune(manifest.step, manifest.best_step)

    def _on_main(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on rank 0, on every rank."""
        return self._on_all(act if self.rank == 0 else lambda: None)[0]

    def _on_all(self, act: Callable[[], Any]) -> list[Any]:
        """What `act` returns on each rank, on every rank; fails on every rank where it fails on one."""
        result = failure = None
        try:
            result = act()
        except (Exception, CheckpointException) as error:
            failure = _describe(error)
        outcomes: list[Any] = [(result, failure)]
        if self.group is not None:
            outcomes = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(outcomes, (result, failure), group=self.group)
        for _, said in outcomes:
            if said is not None:
                raise _Failure(*said)
        return [result for result, _ in outcomes]


class _Failure(Exception):
    """What went wrong on some rank: the number of the operating system's error, or None, and a sentence."""

    def __init__(self, number: int | None, text: str) -> None:
        super().__init__(text)
        self.number = number
        self.text = text

    def as_known(self, place: Path, step: int) -> UserError | RunFault:
        start = f"the checkpoint of step {step} was not written to {place}"
        if self.number in NO_ROOM:
            return UserError(f"{start}: no room on the disk; free some space and run again")
        if self.number is not None:
            return UserError(f"{start}: {os.strerror(self.number)}")
        return RunFault(f"{start}: {self.text}")


def _describe(error: BaseException) -> tuple[int | None, str]:
    if isinstance(error, CheckpointException):  # the library's collection of every rank's error
        error = next(iter(error.failures.values()))[0]
    number = error.errno if isinstance(error, OSError) else None
    return number, str(error) or type(error).__name__
