"""A run that is told to stop writes a checkpoint and says so; how it ended stands in RUN/status.json.

SIGTERM, SIGUSR1 and SIGINT only set a flag here. The ranks exchange their flags with the losses of the step, so all
of them stop after the same step, whichever one heard. A launcher passes SIGTERM and SIGINT on to its ranks (SIGKILL
follows 30 s later); SIGUSR1 and SIGKILL end it at once, and the kernel then sends each rank SIGTERM.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from isotune.distributed.launch import Process
from isotune.io.errors import Superseded, UserError, exit_status, status_word
from isotune.io.job_status import write_job_status
from isotune.run.attempt import slurm_ids
from isotune.run.run_dir import ENVIRONMENT, STATUS, RunDir
from isotune.run.run_lease import RunLease

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_KEYSTROKE_SECONDS = 1.0  # a launcher passes on the SIGINT that the terminal also sent
PR_SET_PDEATHSIG = 1


class StopRequest:
    """What this process has been told.

    Attributes:
        by: the name of the signal, None while there was none.
    """

    def __init__(self) -> None:
        self.by: str | None = None
        self._first_interrupt: float | None = None

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. A second SIGINT ends the process at once, as an impatient user expects.

        A launcher passes on the first SIGINT as such, and the second as a SIGTERM.
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
    """RUN/status.json: what a scheduler's script judges a run by, since launchers report every status as 1.

    Keys: `status` (running, preempted, finished, failed), `step`, `exit_status`, `message`, `time`. A file that says
    `running` after its processes are gone is that of a run that was killed. On SLURM also `slurm`: job, restart.
    """

    def __init__(self, folder: Path, *, is_main: bool, fence: RunLease | None = None) -> None:
        self.path = folder / STATUS
        self.fence = fence or RunLease(folder)
        self.is_main = is_main
        self.step = 0
        self._lock = threading.Lock()  # the thread that writes checkpoints tells of them
        self._ended = False

    def write(self, status: str, exit_status: int | None = None, message: str | None = None) -> None:
        """Replace the file at one stroke; before the run has begun, and on other ranks, do nothing."""
        if not self.is_main or not (self.path.parent / ENVIRONMENT).is_file():
            return
        content: dict[str, Any] = {"status": status, "step": self.step, "exit_status": exit_status}
        content |= {"message": message, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid()}
        if (ids := slurm_ids()) is not None:
            content["slurm"] = ids
        with self._lock, contextlib.suppress(OSError):  # a full disk is said by what needed the room
            if not self._ended:  # a checkpoint that was still on its way changes nothing about how the run ended
                self._ended = exit_status is not None
                self.fence.put(self.path, json.dumps(content, indent=2) + "\n")
                write_job_status(**content, run=str(self.path.parent.resolve()))

    def reached(self, step: int) -> None:
        """The run goes on, and would not lose what comes before `step`."""
        self.step = step
        self.write("running")


@contextlib.contextmanager
def supervised(run: RunDir, process: Process) -> Iterator[None]:
    """Hold the run folder, hear signals while the body trains and saves, and write down how it ends.

    Raises:
        UserError: another process holds the folder; the same on every rank.
        Superseded: another life has taken it over; status.json is that one's, and is left alone.
    """
    _hold(run, process)
    status = run.status = RunStatus(run.path, is_main=process.is_main, fence=run.fence)
    before = _install()
    try:
        yield
    except Superseded:
        raise
    except BaseException as error:
        number = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else exit_status(error)
        with contextlib.suppress(Superseded):
            status.write(status_word(error), number, str(error) or type(error).__name__)
        raise
    else:
        status.write("finished", 0)
    finally:
        if process.is_main:
            run.fence.release()
        for number, handler in before.items():
            signal.signal(number, handler)


def _hold(run: RunDir, process: Process) -> None:
    """The main process takes the folder, and all ranks know whether it could, and of which life they are."""
    answer: list[Any] = [None]
    if process.is_main:
        try:
            run.hold(process.world_size)
            answer = [run.fence.folder]
        except (UserError, Superseded) as error:
            answer = [error]
    if process.world_size > 1:
        dist.broadcast_object_list(answer, src=0, device=process.device)
    if isinstance(answer[0], Exception):
        raise answer[0]
    run.fence.folder = answer[0]


def _install() -> dict[int, Any]:
    """Put the handlers in place; returns the ones before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    _outlive_no_launcher()
    return {number: signal.signal(number, stop_request.hear) for number in SIGNALS}


def _outlive_no_launcher() -> None:
    """Have the kernel send SIGTERM when the process dies that started this one: no rank is left behind."""
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not sys.platform.startswith("linux") or not launched:
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it went in between
        stop_request.hear(signal.SIGTERM)
