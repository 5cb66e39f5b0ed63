"""How `isotune sft`, `classify`, `arena` and `eval` start: what a user types becomes one process or a launch.

A recipe's mistakes are answered before any process starts. Every process of a launch runs the same command by
`python -m isotune.cli`, knows from its environment that it was launched, and then does the work.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from isotune.distributed.launch_file import read_launch_file
from isotune.io import shipped
from isotune.io.errors import (
    EXIT_FAULT,
    JOB_STATUS_FILE,
    OneSentenceParser,
    UserError,
    read_job_status,
)
from isotune.io.extras import need
from isotune.io.parent_process import is_launched, pass_on, signal_when_parent_ends
from isotune.io.reading import Unreadable
from isotune.io.variables import MAX_PROCESSES
from isotune.run.malloc_tuning import VARIABLE, malloc_tunables

LAUNCHER = "isotune.distributed.accelerate_launch"
PROGRAM = "isotune.cli"
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@dataclass(frozen=True)
class Launch:
    """The engine's launch file and the number of processes; without a file this process does the work."""

    file: Path | None = None
    processes: int = 1

    @property
    def in_words(self) -> str:
        """`zero2 on 4 processes`."""
        return f"{self.file.stem if self.file else 'one process'} on {self.processes} processes"


def read_launch(argv: Sequence[str], gpus: int | None = None) -> tuple[Launch, list[str]]:
    """The launch that the flags `--num_processes` and `--engine` ask for, and the other words in their order.

    Without them: one process for each of `gpus` (None: those that this process sees), or one on the CPU; DDP where
    there are several. UserError: no such engine, an engine that needs other numbers of processes, or one that a
    launcher has chosen already.
    """
    parser = OneSentenceParser(prog="isotune", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--engine")
    given, rest = parser.parse_known_args(list(argv))
    if is_launched():
        if given.num_processes is not None or given.engine is not None:
            raise UserError("a launcher started this process: leave --num_processes and --engine to it")
        return Launch(), rest
    if given.num_processes is not None and not 1 <= given.num_processes <= MAX_PROCESSES:
        least = "a run has at least one process" if given.num_processes < 1 else f"at most {MAX_PROCESSES:,} start"
        raise UserError(f"--num_processes is {given.num_processes}: {least}")
    return _launch(given.engine, given.num_processes, count_gpus() if gpus is None else gpus), rest


def _launch(engine: str | None, processes: int | None, gpus: int) -> Launch:
    if engine is None:
        processes = processes or max(1, gpus)
        engine = "single" if processes == 1 else "ddp"
    file = shipped.require(shipped.ENGINES, engine, "--engine")
    try:
        keys = read_launch_file(file)
    except Unreadable as reason:
        raise UserError(f"--engine {reason.of(file)}") from reason
    kind = keys.get("distributed_type")
    if kind in ("NO", False):
        if (processes or 1) > 1:
            raise UserError(f"--engine {engine} is one process, and --num_processes {processes}: say --engine ddp")
        return Launch()
    if kind == "DEEPSPEED":
        need("deepspeed", f"--engine {engine}")
    return Launch(file, processes or gpus or keys.get("num_processes") or 1)


def gpu_names(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The NVIDIA GPUs that a process sees, as CUDA_VISIBLE_DEVICES names them, else by the driver's files.

    torch would say it too, and is slow to import.
    """
    files = [file for file in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not files:
        return [str(number) for number in range(len(files))]
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """How many there are of `gpu_names`."""
    return len(gpu_names(environment))


def run_launched(words: Sequence[str], launch: Launch) -> int:
    """Run `isotune WORDS` on the processes of a launch; the exit status is the run's own, not the launcher's.

    The launcher is in a session of its own, so a signal reaches it once: from here.
    """
    assert launch.file is not None
    command = [sys.executable, "-m", LAUNCHER, "--config_file", str(launch.file)]
    command += ["--num_processes", str(launch.processes), "--main_process_port", "0", "-m", PROGRAM, *words]
    print(f"launching   {launch.in_words}", flush=True)
    with _temporary_folder() as folder:
        file = Path(os.environ.get(JOB_STATUS_FILE) or folder / "status.json")
        return _run_watched(command, file, _shares(launch.processes))


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, and where there are any its sentence and reason (isotune.io.errors)."""

    exit_status: int
    message: str | None = None
    reason: str | None = None


class Command:
    """`isotune WORDS` in a process of its own, which has begun; on Linux it is told to stop when this one ends.

    Args:
        variables: of its environment, beside those of this process.
        log: the file that its output is appended to; None: it goes where that of this process goes.
    """

    def __init__(
        self, words: Sequence[str], variables: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="isotune-"))
        first = signal_when_parent_ends if sys.platform == "linux" else None
        environment = {**os.environ, JOB_STATUS_FILE: str(self._status_file), **(variables or {})}
        with contextlib.ExitStack() as files:
            output = None if log is None else files.enter_context(log.open("ab"))
            self.process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, *words],
                env=environment,
                start_new_session=True,
                preexec_fn=first,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
            )

    @property
    def _status_file(self) -> Path:
        return self._folder / "status.json"

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        said = read_job_status(self._status_file)
        shutil.rmtree(self._folder, ignore_errors=True)
        return Ended(exit_status(code, said), said.get("message"), said.get("reason"))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder of this process; a TemporaryDirectory would be removed by the end of any fork of it too."""
    folder = Path(tempfile.mkdtemp(prefix="isotune-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_watched(command: Sequence[str], file: Path, variables: Mapping[str, str]) -> int:
    """Run a command whose ranks write a job status file, and pass signals on to it; the run's own exit status."""
    file.unlink(missing_ok=True)
    environment = {**os.environ, JOB_STATUS_FILE: str(file), **variables}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    with stop_signals_to(lambda number: pass_on(process, number)):
        return exit_status(process.wait(), read_job_status(file))


def exit_status(code: int, job_status: Mapping[str, Any]) -> int:
    """The run's exit status: launchers answer 1 whatever happened, and the ranks have written what did."""
    status = job_status.get("exit_status")
    if code != 0 and status in (None, 0):
        return EXIT_FAULT  # killed, or a rank failed after the first one had finished
    return code if status is None else int(status)


def _shares(processes: int) -> dict[str, str]:
    """Variables that every process of the launch gets: its share of the cores, and malloc's settings."""
    shares = {} if (tunables := malloc_tunables(os.environ)) is None else {VARIABLE: tunables}
    if "OMP_NUM_THREADS" not in os.environ:
        shares["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return shares


@contextmanager
def stop_signals_to(told: Callable[[int], None]) -> Iterator[None]:
    """Within it `told` is called with each signal that should stop this process, which goes on.

    SIGUSR1 would end a launcher at once; it comes as SIGTERM, which asks for the same.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        told(signal.SIGTERM if signal.Signals(number).name == "SIGUSR1" else number)

    numbers = [getattr(signal, name) for name in FORWARDED if hasattr(signal, name)]
    previous: dict[int, Any] = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
