"""Preemption: signals that ask a run to stop after a checkpoint, and RUN/status.json, which records how it ended.

SIGTERM, SIGUSR1 and SIGINT only set a flag. The ranks exchange their flags with the losses of the step, so all of them
stop after the same step, whichever one received the signal. A launcher forwards SIGTERM and SIGINT to its ranks
(SIGKILL follows 30 s later); SIGUSR1 and SIGKILL end the launcher at once, and the kernel then sends each rank SIGTERM.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistNetworkError

from isotune.distributed.launch import Process
from isotune.distributed.rank_log import rank_log
from isotune.distributed.ranks import call_on_main
from isotune.io.errors import (
    NO_ROOM,
    Preempted,
    Superseded,
    UserError,
    as_user_error,
    outcome_of,
    reason_of,
    write_job_status,
)
from isotune.io.parent_process import is_launched, signal_when_parent_ends
from isotune.io.run_files import ENVIRONMENT, LOGS_DIR, STATUS, or_empty, read_status
from isotune.run.run_dir import LeasedDir
from isotune.run.run_lease import RunLease, slurm_ids

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
MODEL_STEP = "model"  # the first of `finishing`: RUN/model is written and verified
SAME_KEYSTROKE_SECONDS = 1.0  # a launcher forwards the SIGINT that the terminal also sent


class StopRequest:
    """Whether a signal has asked this process to stop: `by` is the name of the first one, None while there was none."""

    def __init__(self) -> None:
        self.by: str | None = None
        self._first_interrupt: float | None = None

    def on_signal(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: remember the first signal. A second Ctrl-C ends the process at once.

        A launcher forwards the first SIGINT as a SIGINT, and the second as a SIGTERM.
        """
        now = time.monotonic()
        again = self._first_interrupt is not None and now - self._first_interrupt > SAME_KEYSTROKE_SECONDS
        if again and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGINT:
            self._first_interrupt = self._first_interrupt or now
        self.by = self.by or signal.Signals(number).name


stop_request = StopRequest()


class RunStatus:
    """RUN/status.json, which scheduler scripts read, because launchers turn every exit status into 1.

    Keys: `status` (running, preempted, paused, finished, failed), `step`, `steps` (of the whole run), `exit_status`,
    `message`, `time`, `pid`, `finishing`, the steps after training that are done, and `made`, the bytes of the files
    that they made; on SLURM also `slurm`. `running` without a running process means that the run was killed.
    """

    def __init__(self, folder: Path, *, is_main: bool, lease: RunLease | None = None) -> None:
        self.path, self.is_main, self.lease = folder / STATUS, is_main, lease or RunLease(folder)
        self.step = 0
        self.steps: int | None = None
        self.finishing: list[str] = []
        self.made: dict[str, int] = {}
        self._current: tuple[str, int | None, str | None, dict[str, str]] = ("running", None, None, {})
        self._lock = threading.Lock()  # the checkpoint writer's thread calls `reached`
        self._ended = False

    def write(self, status: str, exit_status: int | None = None, message: str | None = None, **reason: str) -> None:
        """Replace the file atomically; do nothing before the run has begun, and on other ranks.

        `reason` is that of the error that the run ended with (`reason_of`).
        """
        if not self.is_main or not os.path.isfile(self.path.parent / ENVIRONMENT):  # false on a disk out of reach
            return
        with self._lock:
            if self._ended:  # a checkpoint that is published late does not change how the run ended
                return
            self._ended, self._current = exit_status is not None, (status, exit_status, message, reason)
            self._replace()

    def has_done(self, step: str, made: Iterable[Path] = ()) -> None:
        """A step of finishing is done, and `made` are files of the run by it; nothing else of the file changes."""
        with self._lock:
            self.finishing = [*dict.fromkeys([*self.finishing, step])]
            self.made |= {file.relative_to(self.path.parent).as_posix(): file.stat().st_size for file in made}
            self._replace()

    def go_on(self) -> None:
        """Keep what an earlier attempt recorded of a run whose training is over."""
        recorded = or_empty(read_status, self.path.parent)
        self.step, self.steps = recorded.get("step", 0), recorded.get("steps")
        self.finishing, self.made = recorded.get("finishing", []), recorded.get("made", {})

    def _replace(self) -> None:
        status, exit_status, message, reason = self._current
        content: dict[str, Any] = {"status": status, "step": self.step, "steps": self.steps, "exit_status": exit_status}
        content |= {"message": message, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid()}
        content |= {"finishing": self.finishing, "made": self.made, **reason}
        if (ids := slurm_ids()) is not None:
            content["slurm"] = ids
        text = json.dumps(content, indent=2) + "\n"
        # what else cannot be written is reported by the one that needs it
        with contextlib.suppress(OSError, UserError):
            try:
                self.lease.write_file(self.path, text)
            except OSError as error:
                if error.errno not in NO_ROOM or not self.lease.free_reserve():
                    raise
                self.lease.write_file(self.path, text)
        write_job_status(**content, run=str(self.path.parent.resolve()))

    def reached(self, step: int) -> None:
        """The run goes on, and `step` is in a checkpoint."""
        self.step = step
        self.write("running")


@contextlib.contextmanager
def supervised(run: LeasedDir, process: Process, *, catches_signals: bool = True) -> Iterator[None]:
    """Hold the lease on RUN, handle signals while the body trains and saves, and record how it ends.

    Without `catches_signals` they do what they did before: nothing in the body would stop for one.
    UserError on every rank where another process holds the lease; Superseded where another attempt has taken it over:
    status.json belongs to that one and is left alone.
    """
    run.lease.folder = call_on_main(process, lambda: run.acquire_lease(process.world_size))
    status = run.status = RunStatus(run.path, is_main=process.is_main, lease=run.lease)
    if run.is_trained:
        status.go_on()
        status.write("running")
    previous_handlers: dict[int, Any] = {}
    if catches_signals and threading.current_thread() is threading.main_thread():
        _end_with_launcher()
        previous_handlers = {number: signal.signal(number, stop_request.on_signal) for number in SIGNALS}
    try:
        log = run.path / LOGS_DIR / f"rank-{process.rank}.log"
        with rank_log(log, process.rank, process.world_size), _preempted_with_launcher(run.again):
            yield
    except Superseded:
        raise
    except BaseException as error:
        error = as_user_error(error) or error
        word, number = outcome_of(error)
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            number = error.code
        with contextlib.suppress(Superseded, UserError):
            status.write(word, number, str(error) or type(error).__name__, **reason_of(error))
        raise
    else:
        process.watchdog.wait_for_main(lambda: stop_request.by is not None)
        status.write("finished", 0)
    finally:
        process.watchdog.stop()
        if process.is_main:
            run.lease.release()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _preempted_with_launcher(again: str) -> Iterator[None]:
    """Preempted where this rank was told to stop and the launch's store is gone: its launcher was killed.

    Where another rank fails, the launcher tells this one to stop too, and serves the store until it has ended.
    """
    try:
        yield
    except DistNetworkError as error:
        if stop_request.by is None:
            raise
        raise Preempted(f"stopped by {stop_request.by}: its launcher was killed; {again} goes on") from error


@contextlib.contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Within it a signal ends the process, as it does without a handler: nothing is left to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = {
        number: signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for number in SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)


def _end_with_launcher() -> None:
    """Ask the kernel to send SIGTERM when the launcher dies, so that no rank outlives it."""
    if is_launched() and signal_when_parent_ends():
        stop_request.on_signal(signal.SIGTERM)
