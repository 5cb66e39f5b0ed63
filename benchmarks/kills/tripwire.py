"""In a process of a run: ends it, or those beside it, at a drawn event; or counts the events of an undisturbed run.

Events are the phases that the watchdog is told of, and what a process writes below its run: each file that is opened,
each write to it, each rename, removal and new folder. A kill inside a write leaves half of what was to be written.
"""

import io
import json
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from kills.drawing import ALL, BY_TIME, LAUNCHER, ONE, STOPPED, Kill

PHASES_OF_WATCHDOG = (  # how what it is told begins
    ("the preparation of the data", "preparation"),
    ("the loading of the model", "preparation"),
    ("its first step", "preparation"),
    ("step ", "step"),
    ("the evaluation after", "evaluation"),
    ("the saving of the model", "model"),
    ("the finishing of the run", "finishing"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Tripwire:
    """Where a process of an attempt is, and what it does at the drawn event.

    Attributes:
        run: the run's folder; its events are those of the processes that call `install`.
        kill: None where only events are counted.
        number: of the event of the kill's phase at which it happens, from 1.
        delay_seconds: from a phase that is no write to the kill.
        report: the file that says where the kill happened; of the counts, without a kill.
    """

    def __init__(self, run: Path, kill: Kill | None, number: int, delay_seconds: float, report: Path) -> None:
        self.run, self.kill, self.number, self.delay_seconds = str(run), kill, number, delay_seconds
        self.report, self.rank, self.phase, self.said = report, 0, "start", "its start"
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._entered = time.monotonic()
        self._tripped = False
        self._removing: str | None = None

    def install(self, rank: int, *, exports: bool = False) -> None:
        """Watch this process from now on."""
        self.rank, self._entered = rank, time.monotonic()
        if exports:
            self.phase = "export"
        sys.addaudithook(self._audited)
        mock.patch.object(Path, "open", self._opening(Path.open)).start()
        if (watchdog := sys.modules.get("isotune.distributed.watchdog")) is not None:  # it imports torch
            for name in ("enter", "progress"):
                stock = getattr(watchdog.Watchdog, name)
                mock.patch.object(watchdog.Watchdog, name, self._telling(stock)).start()
        self._event("start", "its start")

    def write_counts(self) -> None:
        """Of an attempt that was not disturbed: events and seconds by phase."""
        if self.kill is None:
            self._enter("end", "its end")
            counts = {"counts": self.counts, "seconds": self.seconds}
            self.report.with_suffix(f".{self.rank}.json").write_text(json.dumps(counts))

    def _telling(self, stock: Any) -> Any:
        def tell(watchdog: Any, phase: str | None = None) -> None:
            stock(watchdog, phase)
            for beginning, own in PHASES_OF_WATCHDOG:
                if phase and phase.startswith(beginning):
                    self._enter(own, phase)
                    self._event(own, phase)

        return tell

    def _enter(self, phase: str, said: str) -> None:
        now = time.monotonic()
        self.seconds[self.phase] += now - self._entered
        self.phase, self.said, self._entered = phase, said, now

    # ---- what is written ----

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            is_written = any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & WRITING
            if is_written and not isinstance(path, int):
                self._written(f"open {_text(path)}", _text(path))
        elif event == "os.rename":
            self._written(f"rename to {_text(arguments[1])}", _text(arguments[1]), _text(arguments[0]))
        elif event == "shutil.rmtree":
            self._removing = self.phase_of(_text(arguments[0]))
            self._written(f"removal of {_text(arguments[0])}", _text(arguments[0]))
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            path = _text(arguments[0])
            if not path.startswith("/") and event in ("os.remove", "os.rmdir") and self._removing is not None:
                self._event(self._removing, f"{event} {path}")
            else:
                self._written(f"{event} {path}", path)

    def _written(self, what: str, *paths: str) -> None:
        phase = next((phase for path in paths if (phase := self.phase_of(path)) is not None), None)
        if phase is not None:
            self._event(phase, what)

    def phase_of(self, path: str) -> str | None:
        """The phase of a write, by its path; None for what is no file of the run."""
        if self.phase == "export":
            return "export" if path.startswith(self.run) else None
        if not path.startswith(f"{self.run}/"):
            return None
        within = path.removeprefix(f"{self.run}/")
        name = within.rsplit("/", 1)[-1]
        if name == "MANIFEST.json":
            return "manifest"
        if name.startswith("step-") or (name.endswith((".before", ".tmp-removed")) and "step-" in name):
            return "publication"
        if ".step-" in within or within == "checkpoints":
            return "checkpoint files"
        if name in ("metrics.jsonl", "status.json"):
            return name
        if self.phase == "finishing":
            return "finishing"
        if within.split("/", 1)[0] in ("model", "model.unverified", "model.before"):
            return "model"
        return None if name == "heartbeat" else "run files"

    def _opening(self, stock: Any) -> Any:
        """Path.open that has a file of the kill's phase tell of each write."""

        def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = stock(path, mode, *arguments, **options)
            phase = self.phase_of(str(path)) if set(mode) & set("wax+") else None
            if phase is None or (self.kill is not None and phase != self.kill.phase):
                return file
            return TellingFile(file, lambda: self._event(phase, f"half a write to {path}"))

        return opened

    # ---- the kill ----

    def _event(self, phase: str, what: str) -> None:
        self.counts[phase] += 1
        if self.kill is None or phase != self.kill.phase or self.counts[phase] != self.number or self._tripped:
            return
        self._tripped = True
        if phase in BY_TIME and self.delay_seconds:
            timer = threading.Timer(self.delay_seconds, self._act, (what,))
            timer.daemon = True
            timer.start()
        else:
            self._act(what)

    def _act(self, what: str) -> None:
        assert self.kill is not None
        reached = {"phase": self.phase, "said": self.said, "event": what.replace(self.run, "RUN")}
        reached |= {"rank": self.rank, "pid": os.getpid(), "thread": threading.current_thread().name}
        self._tell(json.dumps(reached))
        own, parent, kind = os.getpid(), os.getppid(), self.kill.kind
        is_launched = "LOCAL_RANK" in os.environ
        if kind == ONE:
            os.kill(own, signal.SIGKILL)
        elif kind == ALL:
            ranks = psutil.Process(parent).children() if is_launched else []
            for process in (parent,) if is_launched else ():
                os.kill(process, signal.SIGKILL)
            for process in ranks:
                if process.pid != own:
                    process.kill()
            os.kill(own, signal.SIGKILL)
        elif kind == STOPPED:  # whoever started the attempt kills it, a moment later
            os.kill(own, signal.SIGSTOP)
        elif kind == LAUNCHER:
            os.kill(parent, signal.SIGKILL)
        else:
            os.kill(parent if is_launched and self.kill.at_launcher else own, signal.SIGTERM)

    def _tell(self, text: str) -> None:
        """Write the report by one rename: who waits for it finds all of it."""
        unfinished = self.report.with_suffix(".unfinished")
        unfinished.write_text(text)
        unfinished.rename(self.report)


class TellingFile:
    """A file that calls `between` in the middle of each write."""

    def __init__(self, file: Any, between: Any) -> None:
        self._file, self._between = file, between

    def write(self, data: Any) -> int:
        """Write the first half, tell, write the rest; of an unbuffered file the first half alone."""
        half = len(data) // 2
        written = self._file.write(data[:half])
        self._file.flush()
        self._between()
        if isinstance(self._file, io.RawIOBase) and written:
            return written
        return written + self._file.write(data[half:])

    def __enter__(self) -> "TellingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _text(path: Any) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
