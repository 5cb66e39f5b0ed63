"""A lock that the processes of a machine share, whose holder is named where it does not go on.

NAME.lock           locked while it is held; the system releases it when its holder dies
NAME.lock.holder    who holds it, touched every BEAT_SECONDS
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from isotune.io.cache_root import disk_errors_named
from isotune.io.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

BEAT_SECONDS = 5.0
POLL_SECONDS = 1.0
NOTE_SECONDS = 60.0  # of waiting, after which a line names the holder
SILENT_SECONDS = 120.0  # without a beat, after which the wait ends: a stopped process keeps its lock


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock while the body runs; waits for another holder as long as that one shows signs of life.

    Its folder, one of the cache, is made. UserError names a holder that shows none, or a disk that takes no file.
    """
    from filelock import FileLock  # every command imports this package

    file, record, ended = FileLock(lock), lock.with_name(f"{lock.name}.holder"), threading.Event()
    with disk_errors_named(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        _acquire(file, lock, record)

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(record)

    try:
        rank = f"rank {os.environ['RANK']}, " if os.environ.get("RANK") else ""
        with contextlib.suppress(OSError):  # a record alone; whoever needs the disk reports it
            record.write_text(f"{rank}process {os.getpid()} on {socket.gethostname()}", "utf-8")
        threading.Thread(target=beat, name="lock", daemon=True).start()
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            record.unlink()
        file.release()


def _acquire(file: "BaseFileLock", lock: Path, record: Path) -> None:
    from filelock import Timeout

    last, silent_seconds, began, is_noted = None, 0.0, time.monotonic(), False
    while True:
        try:
            file.acquire(timeout=POLL_SECONDS)
        except Timeout:
            beat = _last_beat(record)
            # counted, not measured: a launch that is stopped as a whole and goes on has looked at nothing meanwhile
            silent_seconds = silent_seconds + POLL_SECONDS if beat is not None and beat == last else 0.0
            last = beat
            if silent_seconds >= SILENT_SECONDS:
                raise UserError(
                    f"{lock} is held by {_holder(record)}, which has shown no sign of life for {silent_seconds:g} s: "
                    "let it go on or end it, and run again"
                ) from None
            if not is_noted and time.monotonic() - began > NOTE_SECONDS:
                is_noted = True
                print(f"note        waiting for {lock}, which {_holder(record)} holds", flush=True)
        else:
            return


def _last_beat(record: Path) -> int | None:
    """When the holder last touched its record, by the file system's clock; None where there is no record."""
    try:
        return record.stat().st_mtime_ns
    except OSError:
        return None


def _holder(record: Path) -> str:
    try:
        return record.read_text("utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
