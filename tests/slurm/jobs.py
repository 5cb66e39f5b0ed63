"""How the tests submit the shipped batch files, unchanged, to a real cluster, and what they look at after."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.launching import REPOSITORY, TINY_CLASSIFIER, Finished
from tests.slurm.cluster import SYSTEM_PATH, Cluster

PATIENCE_SECONDS = 600

# with integer sums the bits are those of any number of processes, so one plain run is what all jobs are compared with
EXACT: dict[str, Any] = TINY_CLASSIFIER | {"exact_gradients": True, "max_steps": 60, "save_steps": 25}


@dataclass
class Job:
    """A submitted job.

    Attributes:
        run: the run folder that it was given.
        log: what the batch script and every rank printed, all lives in one.
    """

    cluster: "Site"
    number: str
    run: Path
    log: Path

    @property
    def text(self) -> str:
        """The log so far."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def lives(self) -> list[Path]:
        """The folder of the job's logs and verdicts: one verdict a life."""
        return sorted(
            self.log.parent.glob(f"*-{self.number}/attempt-*-launch-1.json"),
            key=lambda file: int(file.name.split("-")[1]),  # the tenth comes after the ninth
        )

    def facts(self) -> dict[str, str]:
        """What the controller knows of the job; nothing once it has forgotten it."""
        told = self.cluster.ask("scontrol", "-o", "show", "job", self.number, check=False)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes that train in the newest life, by rank."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if str(self.run) in (process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.Error):
                    environment = process.environ()
                    if "RANK" in environment and environment.get("SLURM_JOB_ID") == self.number:
                        found.append((int(environment["RANK"]), process))
        return [process for _, process in sorted(found, key=lambda one: one[0])]

    def freeze(self) -> list[psutil.Process]:
        """Hold the ranks still in the step they are in, for as long as Slurm needs to notice something."""
        ranks = self.ranks
        for rank in ranks:
            rank.suspend()
        return ranks

    def wait_for(self, what: str, is_so: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
        """Until `is_so`; fails with the log where the job ends before."""
        deadline = time.monotonic() + seconds
        over = 0  # times in a row: the controller may not answer, or the job be between two lives
        while not is_so():
            here = self.facts().get("JobState", "GONE") in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
            over = 0 if here else over + 1
            if (over > 10 and not is_so()) or time.monotonic() > deadline:
                raise AssertionError(f"job {self.number} {self.facts()}: no {what}\n{self.text}")
            time.sleep(0.2)

    def wait_for_step(self, step: int, life: int = 0) -> None:
        """Until the life has written the line of that step."""
        metrics = self.run / "metrics.jsonl"

        def is_there() -> bool:
            begun = f"attempt {life}:" in self.text and self.text.split(f"attempt {life}:")[-1].count("plan  ") > 0
            return begun and metrics.exists() and metrics.read_text().count("\n") >= step

        self.wait_for(f"step {step} in life {life}", is_there)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> "Finished":
        """Until the job is over; `status` is the exit status of its batch script."""
        deadline = time.monotonic() + seconds
        while (facts := self.facts()).get("JobState") in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < deadline, f"job {self.number} is not over: {facts}\n{self.text}"
            time.sleep(0.3)
        status, signal = (int(number) for number in facts["ExitCode"].split(":"))
        return Finished(status or -signal, self.text, facts["JobState"], self.run)


class Site:
    """The cluster, and a user who submits to it from the checkout."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    @property
    def environment(self) -> dict[str, str]:
        """Of the user's shell."""
        environment = {**os.environ, **self.cluster.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        return environment | {"PATH": f"{environment['PATH']}:{SYSTEM_PATH}"}

    def ask(self, *command: str, check: bool = True, variables: dict[str, str] | None = None) -> str:
        """Run one of Slurm's commands; what it printed."""
        environment = self.environment | (variables or {})
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout} {done.stderr}"
        return done.stdout

    def submit(
        self,
        folder: Path,
        file: str,
        *flags: str,
        nodes: int = 1,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> Job:
        """`sbatch` a training file with two processes a node; logs and run lie in `folder`."""
        flags = (*flags, "--output_dir", str(folder / "run"))
        return self.submit_as_it_is(folder, file, *flags, nodes=nodes, options=options, environment=environment)

    def submit_as_it_is(
        self,
        folder: Path,
        file: str,
        *flags: str,
        nodes: int = 1,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> Job:
        """`submit`, and no more flags than those."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "job.log"
        command = ["sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=2", f"--output={log}", *options, file]
        number = self.ask(*command, *flags, variables={"LOGS": str(folder), **(environment or {})}).strip()
        return Job(self, number, folder / "run", log)


def verdicts(job: Job) -> list[dict[str, Any]]:
    """Of every life, in order."""
    return [json.loads(file.read_text()) for file in job.lives]


def bits(run: Path) -> tuple[Any, ...]:
    """Everything that a run computed: each step, the evaluations, each prediction, the final weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [(one["step"], one["loss"], one["grad_norm"]) for one in lines if "loss" in one]
    evaluations = [(one["step"], one["eval_loss"], one["eval_accuracy"]) for one in lines if "eval_loss" in one]
    weights = (run / "model" / "model.safetensors").read_bytes()
    predictions = {file.parent.name: file.read_text() for file in run.glob("eval/*/predictions.jsonl")}
    return figures, evaluations, predictions, weights
