"""Starts a run by the same command again and again: undisturbed, killed at a drawn event, or on a full disk."""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kills import forks
from kills.checks import Ended, attempts_of, differences, files_of, left_over, result_of, status_of, told_of, untruths
from kills.drawing import BY_TIME, ENGINES, EXPORT, FULL_DISK, RANKS, STOPPED, TRAINING, Kill, RunPlan
from kills.harm import full_but_for, harm_newest
from kills.material import STEPS, write_recipe
from kills.tripwire import Tripwire

ATTEMPT_SECONDS = 200.0  # twice what ddp_timeout and the launcher allow
LAST_ATTEMPTS = 3  # that are left alone, before a run counts as one that cannot be finished
REACH = 0.3  # of the events of a phase of training, within which a kill is drawn: later kills need steps too
STEP_SPREAD = 1.5  # of the room that a run needs, what a full disk leaves at most


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run of an engine comes to, and how often and how long it is in each phase, by rank."""

    result: dict[str, str]
    exported: dict[str, str]
    bytes_of_run: int
    counts: list[dict[str, int]]
    seconds: list[dict[str, float]]


class Attempts:
    """The attempts of one run, in `folder`; what they print is kept in `logs`."""

    def __init__(self, engine: str, folder: Path, logs: Path, model: Path) -> None:
        self.engine, self.folder, self.logs, self.run = engine, folder, logs, folder / "run"
        for place in (folder, logs):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        self.recipe = write_recipe(folder, model)
        self.number = 0

    @property
    def log(self) -> Path:
        """Of the last attempt."""
        return self.logs / f"attempt-{self.number}.log"

    @property
    def is_finished(self) -> bool:
        """By what `isotune runs` says."""
        return told_of(self.run) == "finished"

    @property
    def step(self) -> int:
        """That the run has reached, by status.json; 0 where there is none."""
        status = status_of(self.run)
        return json.loads(status)["step"] if status is not None else 0

    def attempt(self, kill: Kill | None, wire: Callable[[Path], Tripwire | None]) -> Ended:
        """Start the run's command, and wait until no process of it is left."""
        launched, script = ENGINES[self.engine], ["train/sft_opt.py", "--config", str(self.recipe)]
        command = [sys.executable, *script]
        if launched:
            command = [sys.executable, "-m", "accelerate.commands.launch"]
            command += ["--config_file", f"accelerate_configs/{launched}", "--num_processes", str(RANKS)]
            command += ["--main_process_port", "0", *script]
        tripwire = wire(self.logs / f"reached-{self.number + 1}.json")

        def in_rank(rank: int) -> Callable[[], None]:
            if tripwire is None or (kill is not None and kill.rank != rank):
                return lambda: None
            tripwire.install(rank)
            return tripwire.write_counts

        return self._wait(kill, tripwire, lambda: forks.run_python(command, in_rank), is_launched=bool(launched))

    def export(self, kill: Kill | None, wire: Callable[[Path], Tripwire | None]) -> Ended:
        """The same of `isotune export RUN`."""
        tripwire = wire(self.logs / f"reached-{self.number + 1}.json")

        def body() -> None:
            from isotune.cli import main

            if tripwire is not None:
                tripwire.install(0, exports=True)
            try:
                main(["export", str(self.run)])
            finally:
                if tripwire is not None:
                    tripwire.write_counts()

        return self._wait(kill, tripwire, body, is_launched=False)

    def _wait(
        self, kill: Kill | None, tripwire: Tripwire | None, body: Callable[[], Any], *, is_launched: bool
    ) -> Ended:
        self.number += 1
        before, status_before = attempts_of(self.run), status_of(self.run)
        report = tripwire.report if tripwire is not None else self.logs / "none"
        variables = {"ISOTUNE_CACHE": str(self.folder / "cache")}
        pid = forks.start(body, self.log, variables)
        kill_at: float | None = None

        def look() -> None:
            nonlocal kill_at
            if kill is None or kill.kind != STOPPED or not report.exists():
                return
            if kill_at is None:
                kill_at = time.monotonic() + kill.pause_seconds
            elif time.monotonic() >= kill_at:
                kill_at = math.inf
                os.kill(json.loads(report.read_text())["pid"], signal.SIGKILL)

        status = forks.wait_for_all(pid, time.monotonic() + ATTEMPT_SECONDS, look)
        reached = json.loads(report.read_text()) if kill is not None and report.exists() else None
        return Ended(kill, reached, status, is_launched, before, status_before)


def make_reference(engine: str, folder: Path, model: Path) -> Reference:
    """An undisturbed run of an engine and its export, kept in `folder`; read from there where it is."""
    file = folder / "reference.json"
    if file.is_file():
        return Reference(**json.loads(file.read_text()))
    attempts = Attempts(engine, folder / "work", folder / "logs", model)
    reports: list[Path] = []

    def count(report: Path) -> Tripwire:
        reports.append(report)
        return Tripwire(attempts.run, None, 0, 0.0, report)

    for done in (attempts.attempt, attempts.export):
        if (ended := done(None, count)).exit_status != 0:
            sys.exit(f"the undisturbed run of {engine} ended with {ended.exit_status}: see {attempts.log}")
    ranks = RANKS if ENGINES[engine] else 1
    of_ranks = [json.loads(reports[0].with_suffix(f".{rank}.json").read_text()) for rank in range(ranks)]
    of_export = json.loads(reports[1].with_suffix(".0.json").read_text())
    of_ranks[0]["counts"] |= of_export["counts"]
    size = sum(path.stat().st_size for path in attempts.run.rglob("*") if path.is_file())
    reference = Reference(
        result_of(attempts.run),
        files_of(attempts.run / "export"),
        size,
        [of_rank["counts"] for of_rank in of_ranks],
        [of_rank["seconds"] for of_rank in of_ranks],
    )
    file.write_text(json.dumps(vars(reference), indent=1))
    return reference


class KilledRun:
    """A run that goes through its plan; `add` takes a line for each attempt. Without a `disk` it is never filled."""

    def __init__(
        self, plan: RunPlan, attempts: Attempts, reference: Reference, disk: Path | None, add: Callable[[dict], None]
    ) -> None:
        self.plan, self.attempts, self.reference, self.disk, self.add = plan, attempts, reference, disk, add
        self.problems: list[str] = []

    def carry_out(self) -> dict[str, Any]:
        """Every kill that the run lives to, then attempts that are left alone until it is finished."""
        for kill in self.plan.kills:
            if kill.phase != EXPORT and not self.attempts.is_finished:
                self._attempt_on_full_disk(kill)
            if kill.phase != EXPORT and not self.attempts.is_finished:
                self._attempt(kill, self._harmed(kill))
        self._finish()
        for kill in self.plan.kills:
            if kill.phase == EXPORT and self.attempts.is_finished:
                self._attempt(kill, None)
                self._finish_export()
        return {"engine": self.plan.engine, "attempts": self.attempts.number, **self._result()}

    def _attempt_on_full_disk(self, kill: Kill) -> None:
        """Where the plan has one."""
        if kill.harm != FULL_DISK or self.disk is None:
            return
        free_bytes = int(kill.harm_place * STEP_SPREAD * self.reference.bytes_of_run)
        with full_but_for(self.disk, free_bytes):
            ended = self.attempts.attempt(None, lambda report: None)
        if ended.exit_status != 0 and "room" not in self.attempts.log.read_text(errors="replace"):
            self._problem(f"on a disk with {free_bytes} bytes free it ended without saying so")
        self._tell(ended, FULL_DISK, f"{free_bytes} bytes free")

    def _harmed(self, kill: Kill) -> str | None:
        """What was done to the newest checkpoint, where the plan says so."""
        if kill.harm in (None, FULL_DISK) or (self.attempts.run / "model").exists():
            return None
        return harm_newest(self.attempts.run, str(kill.harm), kill.harm_place)

    def _attempt(self, kill: Kill, harmed: str | None) -> None:
        kill, number, delay_seconds = self._place(kill)

        def wire(report: Path) -> Tripwire:
            return Tripwire(self.attempts.run, kill, number, delay_seconds, report)

        ended = (self.attempts.export if kill.phase == EXPORT else self.attempts.attempt)(kill, wire)
        if ended.reached is None and ended.exit_status != 0:
            self._problem(f"it ended with {ended.exit_status} before the kill in {kill.phase}")
        self._tell(ended, kill.harm if harmed else None, harmed)

    def _place(self, kill: Kill) -> tuple[Kill, int, float]:
        """The kill on a rank that has its phase, the event of the phase, from 1, and the seconds from there."""
        counts, seconds = self.reference.counts, self.reference.seconds
        rank = kill.rank if counts[kill.rank].get(kill.phase) else 0
        events = counts[rank].get(kill.phase, 1)
        left = 1 - self.attempts.step / STEPS
        reach = min(REACH, left) if kill.phase in TRAINING else 1.0
        number = 1 + int(kill.place * max(events * reach, 1))
        kill = replace(kill, rank=rank)
        if kill.phase not in BY_TIME:
            return kill, number, 0.0
        share_of_event = kill.place * max(events * reach, 1) % 1
        return kill, number, share_of_event * seconds[rank].get(kill.phase, 0.0) / events

    def _finish(self) -> None:
        for _ in range(LAST_ATTEMPTS):
            ended = self.attempts.attempt(None, lambda report: None)
            self._tell(ended, None, None)
            if ended.exit_status == 0:
                return
            self._problem(f"left alone it ended with {ended.exit_status}")

    def _finish_export(self) -> None:
        """Export again, unless the killed one has left all of it, which the next one says."""
        ended = self.attempts.export(None, lambda report: None)
        self._tell(ended, None, None)
        if differ := differences(files_of(self.attempts.run / "export"), self.reference.exported):
            self._problem(f"exported again, it differs in {', '.join(differ)}")

    def _tell(self, ended: Ended, harm: str | None, harm_done: str | None) -> None:
        kill, lies = ended.kill, untruths(self.attempts.run, ended, STEPS)
        if ended.exit_status is None:
            self._problem(f"a process was left after {ATTEMPT_SECONDS:g} s")
        self.add({
            "attempt": self.attempts.number,
            "engine": self.plan.engine,
            "intended_phase": kill and kill.phase,
            "phase": kill and ended.reached and (ended.reached["phase"] if kill.phase in BY_TIME else kill.phase),
            "kind": kill and kill.kind,
            "rank": kill and kill.rank,
            "reached": ended.reached,
            "harm": harm,
            "harm_done": harm_done,
            "exit_status": ended.exit_status,
            "outcome": told_of(self.attempts.run),
            "step": self.attempts.step,
            "untruths": lies,
        })  # fmt: skip
        for lie in lies:
            self._problem(f"untrue: {lie}")

    def _problem(self, what: str) -> None:
        self.problems.append(f"attempt {self.attempts.number}: {what}")

    def _result(self) -> dict[str, Any]:
        if not self.attempts.is_finished:
            return {"result": "unfinished", "problems": self.problems}
        differ = differences(result_of(self.attempts.run), self.reference.result)
        problems = [*self.problems, *(f"differs: {name}" for name in differ)]
        problems += [f"left over: {name}" for name in left_over(self.attempts.run)]
        return {"result": "different" if differ else "equal", "problems": problems}
