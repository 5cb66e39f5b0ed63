"""Commands as forks of this process, which has imported the libraries and computed nothing: a start costs no import.

`accelerate launch` runs its own code in such a fork, and its ranks are forks of that in turn, so launcher, ranks and
signals are those of a user's command. Linux only, and on no machine with a GPU, whose driver does not survive a fork.
"""

import atexit
import ctypes
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from isotune.run.malloc_tuning import GPU_DRIVERS

ROOT = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36
HANDLER = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
LIBRARIES = (
    "accelerate.commands.launch",
    "deepspeed",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "sklearn.metrics",
    "torch.distributed.run",
    "transformers.models.opt.modeling_opt",
    "transformers.trainer",
    "isotune.checkpoint.export",
    "isotune.checkpoint.final_model",
    "isotune.checkpoint.resume",
    "isotune.evaluation.generation.chat",
    "isotune.preflight.startup_check",
    "isotune.report.loss_curve",
    "isotune.report.model_card",
    "isotune.training.from_recipe",
)

InRank = Callable[[int], Callable[[], None]]  # called first in a rank, with its number; what it returns is called last
_in_rank: InRank | None = None  # in a launcher, for its ranks


def can_fork() -> bool:
    """Whether this is Linux without a GPU."""
    return sys.platform == "linux" and not any(driver.exists() for driver in GPU_DRIVERS)


def preload() -> None:
    """Import the libraries, and let every descendant whose parent dies be a child of this process."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for a GPU
    for library in LIBRARIES:
        importlib.import_module(library)
    del os.environ["DS_ACCELERATOR"]
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(body: Callable[[], Any], log: Path, variables: dict[str, str] | None = None) -> int:
    """Call a function in a fork, in a session of its own, with these environment variables; returns its process id."""
    return _fork(body, variables or {}, log)


def run_alone(body: Callable[[], Any], log: Path) -> None:
    """Call a function in a fork and wait for it; what it computes leaves no thread here."""
    status = os.waitstatus_to_exitcode(os.waitpid(start(body, log), 0)[1])
    assert status == 0, log.read_text()


def wait_for_all(main: int, deadline: float, look: Callable[[], None]) -> int | None:
    """Wait until no descendant is left; the exit status of `main`, negative for a signal.

    None where one was left at `deadline`, of time.monotonic: all are killed. `look` is called every few milliseconds.
    """
    status = None
    try:
        while True:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if pid == main:
                status = os.waitstatus_to_exitcode(ended)
            if pid:
                continue
            if time.monotonic() > deadline:
                return None
            look()
            time.sleep(0.004)
    except ChildProcessError:
        return status
    finally:
        children = psutil.Process().children(recursive=True)
        for process in children:
            process.kill()
        psutil.wait_procs(children, timeout=10)  # what is said of the run is looked at next


class ForkedRank:
    """What torchrun uses of subprocess.Popen, for a rank that is a fork of the launcher."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **_: Any) -> None:
        self.args, self.returncode = args, None
        self.pid = _fork(lambda: run_python(list(args), _in_rank), env, None)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, ended = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(ended)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; TimeoutExpired after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return status


def _fork(body: Callable[[], Any], variables: dict[str, str], log: Path | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(writing)
        _become(variables, log)
        _end(body)
    os.close(writing)
    os.read(reading, 1)  # nothing, once the child has a session of its own, which signals are sent to
    os.close(reading)
    return pid


def _become(variables: dict[str, str], log: Path | None) -> None:
    """What a new interpreter would have: no open file of the parent, no handler, these variables."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(ROOT)
    os.environ.update(variables)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the launcher has handlers
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    sys.modules["numpy"].random.seed()  # a fresh interpreter draws its seed too


def _end(body: Callable[[], Any]) -> None:
    """Leave the process with the status of `body`, as Python would, without the clean-up of the libraries."""
    status = 1
    try:
        status = body() or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_python(command: list[str], in_rank: InRank | None) -> None:
    """Run what follows `python` in a command line: a script, in which this is a rank, or -m and a launcher's module."""
    global _in_rank
    words = [word for word in command[1:] if word != "-u"]
    if words[0] == "-m":
        _in_rank = in_rank
        vars(sys.modules[HANDLER])["Popen"] = ForkedRank
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # runpy warns of a module that is there already
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    leave = in_rank(int(os.environ.get("RANK", "0"))) if in_rank is not None else None
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        if leave is not None:
            leave()
