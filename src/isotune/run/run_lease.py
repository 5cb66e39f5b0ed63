"""Of several processes that take a run folder for theirs, one may write: the one that came last.

A job that Slurm requeued can run while its life before still does, on a node whose network was cut. So every life makes
a folder of its own, RUN/.lives/NUMBER-..., and whatever it shows to others gets there by a rename out of that folder.
The next life takes the folder's name away before it looks at anything, and from then on every rename of the life before
fails, wherever it was interrupted. No clock has to be right for that, and no lock to be honoured.

Two lives of one job follow each other. Otherwise a folder in use is refused, naming who holds it: a process of this
machine is looked for; that of another one must move its heartbeat within `WATCH_SECONDS`.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from isotune.io.errors import EXIT_FAULT, Superseded, UserError
from isotune.io.files import replace_file, write_synced
from isotune.io.job_status import write_job_status
from isotune.run.attempt import Attempt

LIVES = ".lives"
RECORD, HEARTBEAT, OVER = "life.json", "heartbeat", ".over"
BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0  # six beats, and the time that a network file system may show an old file for


class RunLease:
    """A run folder's fence, as one process sees it.

    Args:
        run: the run folder, which need not exist.
        end: what to do with the sentence when another life has taken over; prints it and leaves the process.

    Attributes:
        folder: of this life; None while the run is not held.
    """

    def __init__(self, run: Path, end: Callable[[str], object] | None = None) -> None:
        self.run = run
        self.lives = run / LIVES
        self.folder: Path | None = None
        self._end = end or _leave
        self._known_over: set[str] = set()
        self._released = threading.Event()

    # ---- taking ----

    def look(self) -> None:
        """See whether the run may be taken. Changes nothing; can take `WATCH_SECONDS`.

        Raises:
            UserError: it is in use; names by whom.
            Superseded: this is an older life of the job that holds it.
        """
        for folder in self._held():
            if folder.name not in self._known_over and folder != self.folder:
                self._judge(folder, Attempt.read(folder / RECORD))
                self._known_over.add(folder.name)

    def take(self, **record: object) -> Path:
        """Become the newest life, and fence off every other; returns this life's folder.

        Args:
            record: more to write down of this life.

        Raises:
            UserError, Superseded: see `look`; or the folder cannot be written.
        """
        self.look()
        try:
            self.folder = self._enter({**Attempt.of_this_process().as_dict(), "began": time.time(), **record})
            for other in self._held():
                if other.name > self.folder.name:
                    self.release()
                    raise self._superseded()
                if other != self.folder:
                    _revoke(other)
        except OSError as error:
            raise UserError(f"output_dir '{self.run}' cannot be written: {error.strerror}") from error
        threading.Thread(target=self._beat, args=(self.folder,), name="heartbeat", daemon=True).start()
        return self.folder

    def release(self) -> None:
        """The run is no longer held; where nothing has begun, nothing stays."""
        self._released.set()
        if self.folder is None:
            return
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((self.folder / RECORD).read_text("utf-8"))
            replace_file(self.folder / RECORD, json.dumps({**record, "ended": time.time()}, indent=2) + "\n")
        with contextlib.suppress(OSError):
            self.folder.rename(f"{self.folder}{OVER}")
            if [path.name for path in self.run.iterdir()] == [LIVES] and not self._held():
                shutil.rmtree(self.run)
        self.folder = None

    # ---- holding ----

    def check(self) -> None:
        """Raises:
        Superseded: another life has taken over.
        """
        if self.folder is not None and not self.folder.is_dir():
            raise self._superseded()

    def put(self, path: Path, text: str) -> None:
        """`replace_file`, by the newest life only.

        Raises:
            Superseded: this is not the newest any more.
        """
        if self.folder is None:
            replace_file(path, text)
            return
        try:
            replace_file(path, text, self.folder / path.name)
        except FileNotFoundError:
            self.check()
            raise

    # ---- parts ----

    def _held(self) -> list[Path]:
        """The folders of lives that have not ended, or not said so, from the oldest."""
        try:
            return sorted(path for path in self.lives.iterdir() if not path.name.endswith(OVER) and path.name[0] != ".")
        except FileNotFoundError:
            return []

    def _enter(self, record: dict[str, object]) -> Path:
        self.lives.mkdir(parents=True, exist_ok=True)
        new = self.lives / f".{secrets.token_hex(8)}"
        new.mkdir()
        write_synced(new / RECORD, json.dumps(record, indent=2) + "\n")
        newest = max((int(path.name[:8]) for path in self.lives.iterdir() if path.name[0] != "."), default=0)
        own = self.lives / f"{newest + 1:08d}-{secrets.token_hex(4)}"  # nobody's name, before or after
        new.rename(own)
        return own

    def _judge(self, folder: Path, holder: Attempt | None) -> None:
        me = Attempt.of_this_process()
        if holder is not None and holder.job is not None and holder.job == me.job and holder.restart != me.restart:
            assert holder.restart is not None and me.restart is not None
            if holder.restart > me.restart:
                raise Superseded(f"{self.run} is held by a later life of this job: {holder}; this one ends")
            return
        if holder is not None and holder.is_here:
            if holder.runs:
                raise self._in_use(holder)
            return
        before, deadline = _last_beat(folder), time.monotonic() + WATCH_SECONDS
        print(
            f"note        {self.run} was held by {holder}: for {WATCH_SECONDS:g} s we look whether it lives", flush=True
        )
        while time.monotonic() < deadline:
            time.sleep(1)
            if _last_beat(folder) != before:
                raise self._in_use(holder)

    def _in_use(self, holder: Attempt | None) -> UserError:
        return UserError(f"output_dir '{self.run}' is in use by {holder}: wait for it, stop it, or choose another")

    def _superseded(self) -> Superseded:
        held = self._held()
        newest = held and Attempt.read(held[-1] / RECORD)
        return Superseded(f"{self.run} was taken over by {newest or 'another life'}: this one writes nothing and ends")

    def _beat(self, folder: Path) -> None:
        """Show that this life goes on, and end it when it is no longer the newest."""
        beats = 0
        while not self._released.wait(BEAT_SECONDS if beats else 0):
            beats += 1
            try:
                with (folder / HEARTBEAT).open("w") as file:
                    file.write(f"{beats} {time.time()}\n")
            except FileNotFoundError:
                if not self._released.is_set() and not folder.is_dir():
                    self._end(str(self._superseded()))
                    return
            except OSError:  # a disk that is full, or out of reach for a while, is for others to complain of
                continue


def _revoke(folder: Path) -> None:
    """Take a life's folder away: one rename, then what it had half written."""
    over = folder.with_name(f"{folder.name}{OVER}")
    with contextlib.suppress(FileNotFoundError):  # it ended at this very moment
        folder.rename(over)
    for path in over.glob("*") if over.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _last_beat(folder: Path) -> str:
    try:
        return (folder / HEARTBEAT).read_text()
    except OSError:
        return ""


def last_beat_time(file: Path) -> float | None:
    """Seconds since 1970 of a heartbeat, by its own machine's clock; None where there was none."""
    try:
        return float(file.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _leave(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    write_job_status(status="superseded", exit_status=EXIT_FAULT, message=sentence)
    os._exit(EXIT_FAULT)
