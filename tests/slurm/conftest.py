"""The shipped batch files, unchanged, on a real cluster: how the tests submit them and what they look at after."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.launching import REPOSITORY, Finished
from tests.slurm.cluster import SYSTEM_PATH, Cluster, missing

# a minute's limit is the least that Slurm knows, and a life takes half of that only to import its libraries
PATIENCE_SECONDS = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here but the tests of the scripts alone needs the cluster."""
    reason = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"no Slurm cluster: {reason}"))


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
        return sorted(self.log.parent.glob(f"*-{self.number}/life-*.json"))

    def facts(self) -> dict[str, str]:
        """What the controller knows of the job; nothing once it has forgotten it."""
        told = self.cluster.ask("scontrol", "-o", "show", "job", self.number, check=False)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait_for(self, what: str, is_so: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
        """Until `is_so`; fails with the log where the job ends before."""
        deadline = time.monotonic() + seconds
        while not is_so():
            over = self.facts().get("JobState", "GONE") not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
            if (over and not is_so()) or time.monotonic() > deadline:
                raise AssertionError(f"job {self.number} {self.facts()}: no {what}\n{self.text}")
            time.sleep(0.2)

    def wait_for_step(self, step: int, life: int = 0) -> None:
        """Until the life has written the line of that step."""
        metrics = self.run / "metrics.jsonl"

        def is_there() -> bool:
            begun = f"life {life}:" in self.text and self.text.split(f"life {life}:")[-1].count("plan  ") > 0
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

    def ask(self, *command: str, check: bool = True, variables: dict[str, str] | None = None) -> str:
        """Run one of Slurm's commands; what it printed."""
        environment = {**os.environ, **self.cluster.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        environment |= variables or {}
        environment["PATH"] = f"{environment['PATH']}:{SYSTEM_PATH}"
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
        """`sbatch` a file with two processes a node; logs and run lie in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "job.log"
        command = ["sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=2", f"--output={log}", *options, file]
        variables = {"LOGS": str(folder), **(environment or {})}
        number = self.ask(*command, *flags, "--output_dir", str(folder / "run"), variables=variables).strip()
        return Job(self, number, folder / "run", log)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Site]:
    """Three nodes; up once for all tests of this process."""
    root = Path(tempfile.mkdtemp(prefix="isotune-slurm-"))
    one = Cluster(root, 3)
    one.up()
    yield Site(one)
    one.down()
    if keep := os.environ.get("ISOTUNE_KEEP_SLURM_LOGS"):
        shutil.copytree(root / "log", keep, dirs_exist_ok=True)
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def whole_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves every node idle and no job behind, however it ended."""
    yield
    if "cluster" not in request.fixturenames:
        return
    site: Any = request.getfixturevalue("cluster")
    site.ask("scancel", "--full", "--user=root", check=False)
    deadline = time.monotonic() + 90
    while site.cluster.states().count("idle") < len(site.cluster.names):
        assert time.monotonic() < deadline, site.ask("sinfo", "-N", "-l")
        time.sleep(0.3)


def verdicts(job: Job) -> list[dict[str, Any]]:
    """Of every life, in order."""
    return [json.loads(file.read_text()) for file in job.lives]
