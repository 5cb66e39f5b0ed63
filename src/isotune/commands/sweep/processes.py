"""The commands of a sweep in processes of this machine: so many at once, each with its share of GPUs and cores."""

import os
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from isotune.commands import start
from isotune.io.errors import Preempted, UserError
from isotune.io.parent_process import pass_on
from isotune.run.run_state import word_of_run

POLL_SECONDS = 0.05
MOST_WAITED_SECONDS = 60  # for a run of a killed sweep, which stops with a checkpoint


@dataclass(frozen=True)
class Command:
    """A command of the sweep, which trains or evaluates.

    Attributes:
        folder: its --output_dir.
        words: of `isotune`, without --output_dir.
        trial: whose run it is of.
        title: of the line that says that it begins.
        log: the file for its output where it has no terminal of its own.
        variables: of its environment, beside those of this process.
    """

    folder: Path
    words: list[str]
    trial: int
    title: str
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict[str, str])


Ends = Generator[tuple[Command, start.Ended], None, None]


class Processes:
    """Runs commands on this machine, so many at once; Ctrl-C and SIGTERM reach all of them.

    Args:
        shares: the environment variables of each of those that run at once.
        launch: words of each about its processes.
    """

    def __init__(self, shares: Sequence[Mapping[str, str]], launch: Sequence[str]) -> None:
        self.shares, self.launch = shares, launch
        self._running: dict[int, tuple[Command, start.Command]] = {}  # by share
        self._signalled: signal.Signals | None = None

    def wait_for(self, run: Path) -> None:
        """Let a run that a killed sweep has left come to its checkpoint."""
        end = time.monotonic() + MOST_WAITED_SECONDS
        while word_of_run(run) == "running" and time.monotonic() < end:
            time.sleep(0.2)

    def run(self, commands: deque[Command]) -> Ends:
        """Begin them in their order as shares are free, and yield each with its end.

        The caller may take commands out of the queue, and put some into it. Where it closes the generator early, those
        that run are told to stop, and are waited for. Preempted: this process was told to stop.
        """
        with self._stopping():
            while (commands and self._signalled is None) or self._running:
                for share in range(len(self.shares)):
                    if commands and self._signalled is None and share not in self._running:
                        self._begin(share, commands.popleft())
                yield from self._ended()
            if self._signalled is not None:
                raise Preempted(f"stopped by {self._signalled.name}: the same sweep goes on")

    def _begin(self, share: int, command: Command) -> None:
        words, log = [*command.words, f"--output_dir={command.folder}", *self.launch], None
        if len(self.shares) > 1:  # a terminal takes the output of one
            log = command.log
            log.parent.mkdir(parents=True, exist_ok=True)
        print(f"sweep       {command.title}" + (f" ({log})" if log else ""), flush=True)
        self._running[share] = command, start.Command(words, {**self.shares[share], **command.variables}, log)
        if self._signalled is not None:  # it came while the process began, and nobody passed it on
            pass_on(self._running[share][1].process, self._signalled)

    def _ended(self) -> Ends:
        """Those that have ended since the last look."""
        time.sleep(POLL_SECONDS)
        for share, (command, process) in list(self._running.items()):
            if (ended := process.poll()) is not None:
                del self._running[share]
                yield command, ended

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """However the body is left, no process is."""
        with start.stop_signals_to(self._stop):
            try:
                yield
            finally:
                if self._running and self._signalled is None:
                    self._stop(signal.SIGTERM)
                while self._running:
                    for _ in self._ended():
                        pass

    def _stop(self, number: int) -> None:
        self._signalled = signal.Signals(number)
        for _, process in self._running.values():
            pass_on(process.process, number)


def shares_of(
    parallel: int, launch: Sequence[str], environment: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
    """The environment variables of each of so many runs at once; UserError where the GPUs do not suffice.

    `launch` are the words of a run about its processes. Without GPUs, and without OMP_NUM_THREADS, each process has an
    equal share of the cores. One run alone has what this process has.
    """
    if parallel == 1:
        return [{}]
    gpus = start.gpu_names(environment)
    each = len(gpus) // parallel
    processes = start.read_launch(launch, each)[0].processes
    if gpus and processes > each:
        needs = f"{parallel} runs on {processes} GPU{'s' * (processes > 1)} each need {parallel * processes}"
        raise UserError(f"--parallel {parallel}: {needs}, and there are {len(gpus)}")
    shares: list[dict[str, str]] = [{} for _ in range(parallel)]
    for number, share in enumerate(shares):
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * each : (number + 1) * each])
        if "OMP_NUM_THREADS" not in environment:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (parallel * processes)))
    return shares
