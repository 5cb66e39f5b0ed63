"""The commands of a sweep as jobs: each time those that are left are one array, by slurm/sweep.sbatch.

An array has a name that no other has, and its table beside its logs. So a sweep that was killed finds its jobs in the
queue by their names, and submits none of them again.
"""

import os
import re
import secrets
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from isotune.commands import slurm, start
from isotune.commands.sweep.flags import JobOptions
from isotune.commands.sweep.processes import Command, Ends
from isotune.io import shipped
from isotune.io.errors import EXIT_FAULT, EXIT_PREEMPTED, EXIT_USER_ERROR, Preempted, UserError, read_job_status
from isotune.io.files import replace_file

NAME, BATCH_FILE = "isotune-sweep", "sweep.sbatch"
LONGEST_POLL_SECONDS = 15.0
MOST_IN_ARRAY = 1_000  # Slurm's own default of MaxArraySize, less its index 0
VISIBLE_SECONDS = 60.0  # within which a file that a node wrote is seen here: NFS keeps what it knows of a folder
# states in which a job stays; one that Slurm has forgotten has none
OVER = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"})
OVER |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
FORGOTTEN = "no longer known"

Task = tuple[str, int]  # the name of an array, and the line of its table from 1


class Jobs:
    """Runs commands as jobs of a cluster.

    Args:
        folder: of the sweep.
        logs: the folder for the tables, and for what the jobs print.
    """

    def __init__(self, folder: Path, logs: Path, options: JobOptions) -> None:
        slurm.require_sbatch()
        self.folder, self.logs, self.options = folder, logs, options
        self._waiting: dict[Task, Command] = {}
        self._over_since: dict[Task, float] = {}
        self._signalled: signal.Signals | None = None

    def wait_for(self, run: Path) -> None:
        """Nothing: `run` waits for jobs of an earlier call."""

    def run(self, commands: deque[Command]) -> Ends:
        """Submit what is not in the queue of the cluster, and yield each command with its end.

        Preempted where this process was told to stop; the jobs then go on.
        """
        polled = 0
        with start.stop_signals_to(self._stop):
            self._waiting = self._submitted(commands)
            while commands or self._waiting:
                if commands:
                    self._submit(commands)
                    polled = 0
                yield from self._ended()
                if self._waiting and not commands:
                    self._sleep(min(LONGEST_POLL_SECONDS, 1.0 + polled / 4))
                polled += 1

    def _stop(self, number: int) -> None:
        self._signalled = signal.Signals(number)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._signalled is None and time.monotonic() < end:
            time.sleep(0.2)
        if self._signalled is not None:
            arrays = " ".join(dict.fromkeys(f"--name={name}" for name, _ in self._waiting))
            stopped = f"stopped by {self._signalled.name}: the jobs go on, and the same sweep waits for them"
            raise Preempted(f"{stopped} (`scancel {arrays}` ends them)" if arrays else stopped)

    # ---- submitting ----

    def _submit(self, commands: deque[Command]) -> None:
        array = list(islice(commands, MOST_IN_ARRAY))
        lines = [self._line(command) for command in array]
        name = f"{NAME}-{secrets.token_hex(4)}"
        table = self._table(name)
        self.logs.mkdir(parents=True, exist_ok=True)
        replace_file(table, "".join(f"{line}\n" for line in lines))
        log = self.logs / f"{name}-%a.log"
        options = [*self.options.sbatch, f"--job-name={name}", f"--array=1-{len(array)}", f"--output={log}"]
        try:
            said = slurm.submit(["--parsable", *options, str(_batch_file()), str(table)], self._variables(array[0]))
        except BaseException:
            table.unlink(missing_ok=True)
            raise
        for _ in array:
            commands.popleft()
        number = said.partition(";")[0].strip()  # with the name of the cluster, where there are several
        for line, command in enumerate(array, start=1):
            print(f"sweep       {command.title} (job {number}_{line}, {self.logs / name}-{line}.log)", flush=True)
            self._waiting[name, line] = command

    def _line(self, command: Command) -> str:
        """Of the table: the name of the folder in the sweep, and the words after the program's."""
        words = [str(command.folder.relative_to(self.folder)), *command.words[1:]]
        for word in words:
            if not re.fullmatch(r"\S+", word):
                raise UserError(f"--slurm: {word!r} cannot be a word of a job's table, because of its blanks")
        return " ".join(words)

    def _table(self, name: str) -> Path:
        return self.logs / f"{name}.txt"

    def _variables(self, command: Command) -> dict[str, str]:
        """Of the batch script, beside those of this process; commands that are run together have the same."""
        variables = {"SCRIPT": f"-m {slurm.PROGRAM} {command.words[0]}", "EVAL": "", "SWEEP": str(self.folder)}
        variables |= {"LOGS": str(self.logs), "ISOTUNE_HOME": os.getcwd(), "ISOTUNE_FILES": str(shipped.ROOT)}
        engine = {"ENGINE": self.options.engine} if self.options.engine else {}
        return variables | engine | dict(command.variables) | slurm.python_environment(os.environ)

    # ---- waiting ----

    def _submitted(self, commands: deque[Command]) -> dict[Task, Command]:
        """Those commands that are in the cluster's queue, which are taken out of ours."""
        wanted = {str(command.folder.relative_to(self.folder)): command for command in commands}
        found: dict[Task, Command] = {}
        tasks: dict[Task, str] | None = None if any(self.logs.glob(f"{NAME}-*.txt")) else {}
        while tasks is None and (tasks := self._states()) is None:
            self._sleep(LONGEST_POLL_SECONDS)
        for (name, line), state in tasks.items():
            table = self._table(name)
            if state in OVER or not table.is_file():
                continue
            folder = table.read_text("utf-8").splitlines()[line - 1].split()[0]
            if (command := wanted.pop(folder, None)) is not None:
                print(f"sweep       {command.title} (submitted before, {self.logs / name}-{line}.log)", flush=True)
                found[name, line] = command
                commands.remove(command)
        return found

    def _states(self) -> dict[Task, str] | None:
        """The state of each of this user's tasks of arrays; None where the controller does not answer."""
        words = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%K|%T|%j"]
        done = subprocess.run(words, check=False, capture_output=True, text=True, start_new_session=True)
        if done.returncode:
            print(f"note        squeue failed and is asked again: {' '.join(done.stderr.split())}", flush=True)
            return None
        rows = [line.strip().split("|", 2) for line in done.stdout.splitlines()]
        return {(name, int(line)): state for line, state, name in rows if line.isdecimal()}

    def _ended(self) -> Iterator[tuple[Command, start.Ended]]:
        states = self._states()
        for task, command in list(self._waiting.items()):
            state = FORGOTTEN if states is None else states.get(task, FORGOTTEN)
            if states is None or not (state in OVER or state == FORGOTTEN):
                self._over_since.pop(task, None)
                continue
            over_seconds = time.monotonic() - self._over_since.setdefault(task, time.monotonic())
            name, line = task
            verdict = last_verdict(self.logs.glob(f"{name}-*_{line}/attempt-*-launch-1.json"))
            job, log = f"job {line} of {name}", f"{self.logs / name}-{line}.log"
            ended = end_of_job(state, verdict, job, log, is_late=over_seconds > VISIBLE_SECONDS)
            if ended is not None:
                del self._waiting[task]
                yield command, ended


def last_verdict(files: Iterable[Path]) -> Mapping[str, Any]:
    """The job status of the last attempt; empty where there is none."""
    last = max(files, key=lambda file: int(file.name.split("-")[1]), default=None)
    return read_job_status(last) if last else {}


def end_of_job(
    state: str, verdict: Mapping[str, Any], job: str, log: str, *, is_late: bool = False
) -> start.Ended | None:
    """How a job has ended that Slurm has in this state; None while the file that says it may be still to be seen."""
    exit_status = verdict.get("exit_status")
    if verdict.get("status") in ("finished", "paused"):
        return start.Ended(0)
    if exit_status in (EXIT_FAULT, EXIT_USER_ERROR):
        return start.Ended(exit_status, verdict.get("message"), verdict.get("reason"))
    if state == "CANCELLED" or (exit_status == EXIT_PREEMPTED and state != "COMPLETED"):
        return start.Ended(EXIT_PREEMPTED, f"{job} is {state.lower()}, and was not done")
    if state in ("COMPLETED", "FAILED", FORGOTTEN) and not is_late:
        return None
    if state == "FAILED" and not verdict:
        return start.Ended(EXIT_USER_ERROR, f"{job} failed before it began: see {log}")
    return start.Ended(EXIT_FAULT)  # killed: it has said nothing


def _batch_file() -> Path:
    return shipped.ROOT / shipped.BATCH_FILES / BATCH_FILE
