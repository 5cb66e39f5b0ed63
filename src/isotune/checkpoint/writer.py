"""Checkpoints are written asynchronously: training only waits for the copy to host memory.

On each rank a thread writes, syncs and hashes the slices of that rank, over a process group of its own; rank 0 then
publishes the checkpoint. An error on any rank reaches all ranks, which raise it at the end of the next step.
"""

import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from isotune.checkpoint.flat_tensors import FlatTensor, write_tensors, written_by
from isotune.checkpoint.manifest import FileRecord, Manifest, record_file
from isotune.checkpoint.store import CheckpointStore
from isotune.distributed.ranks import several_ranks
from isotune.io.errors import NO_ROOM, RunFault, UserError
from isotune.io.files import write_synced

TENSORS = "tensors"
T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """The training state at the end of a step, copied to host memory."""

    tensors: Mapping[str, FlatTensor]  # this rank's slices, on the CPU; every rank has the same names
    texts: Mapping[str, str]  # contents of the other files by name; only rank 0's are written
    manifest: Manifest  # without its files


class CheckpointWriter:
    """Writes one snapshot at a time; every rank has a writer and calls it at the same steps.

    `on_published` is called on rank 0, in the thread, with the step of each published checkpoint.
    """

    def __init__(self, store: CheckpointStore, on_published: Callable[[int], None]) -> None:
        self.store, self.on_published = store, on_published
        self.error: BaseException | None = None  # with which this rank's thread has failed, until `wait` raises it
        self._rank = dist.get_rank() if several_ranks() else 0
        # a group of its own: the collectives of the thread must not mix with those of training
        self._group: Any = cast(Any, dist).new_group(backend="gloo") if several_ranks() else None
        self._thread: threading.Thread | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Write a snapshot in the background, once the previous one is written; see `wait` for what it may raise."""
        self.wait()
        # a daemon: an unfinished checkpoint does not keep the process alive
        self._thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises UserError for no room or no permission, RunFault for anything else; the same on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _work(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except (UserError, RunFault) as known:
            self.error = known
        except BaseException as unknown:
            self.error = RunFault(f"the checkpoint of step {snapshot.manifest.step} was not written: {unknown!r}")

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.manifest.step
        staging: Path | None = None
        try:
            staging = Path(self._on_main(lambda: str(self.store.stage(step))))
            records = self._on_all(lambda: self._write_own(staging, snapshot.tensors))
            self._on_main(lambda: self._publish(staging, snapshot, [r for of_rank in records for r in of_rank]))
        except _Failure as failure:
            if staging is not None and self._rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            self.store.check_lease()
            errno, message = failure.args
            start = f"the checkpoint of step {step} was not written to {self.store.path}"
            if errno in NO_ROOM:
                raise UserError(f"{start}: no room on the disk; free some space and run again") from failure
            if errno is not None:
                raise UserError(f"{start}: {os.strerror(errno)}") from failure
            raise RunFault(f"{start}: {message}") from failure

    def _write_own(self, staging: Path, tensors: Mapping[str, FlatTensor]) -> list[FileRecord]:
        write_tensors(staging / TENSORS, tensors, self._group)
        return [record_file(staging, path) for path in written_by(staging / TENSORS, self._rank)]

    def _publish(self, staging: Path, snapshot: Snapshot, files: list[FileRecord]) -> None:
        for name, text in snapshot.texts.items():
            write_synced(staging / name, text)
            files.append(record_file(staging, staging / name))
        manifest = dataclasses.replace(snapshot.manifest, files=tuple(files))
        manifest.write(staging)
        self.store.publish(staging, manifest.step)
        self.on_published(manifest.step)
        self.store.prune(manifest.step, manifest.best_step)

    def _on_main(self, call: Callable[[], T]) -> T:
        """Call on rank 0 only; every rank returns its result, or raises."""
        return cast(T, self._on_all(call if self._rank == 0 else lambda: None)[0])

    def _on_all(self, call: Callable[[], T]) -> list[T]:
        """Call on every rank; every rank returns the results by rank, or raises where any rank failed."""
        result: T | None = None
        failure: tuple[int | None, str] | None = None
        try:
            result = call()
        except (Exception, CheckpointException) as error:
            # torch collects the errors of all ranks in one
            first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            errno = first.errno if isinstance(first, OSError) else None
            failure = errno, str(first) or type(first).__name__
        outcomes: list[Any] = [(result, failure)]
        if self._group is not None:
            outcomes = [None] * dist.get_world_size(self._group)
            cast(Any, dist).all_gather_object(outcomes, (result, failure), group=self._group)
        for _, failed in outcomes:
            if failed is not None:
                raise _Failure(*failed)
        return [result for result, _ in outcomes]


class _Failure(Exception):
    """An error on some rank: its errno, or None, and its message."""
