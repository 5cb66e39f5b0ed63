"""Runs to serve, and `isotune serve` as a process: how the tests start it, ask it and stop it."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
from accelerate.state import AcceleratorState

from isotune.commands.trained import evaluate_classifier, generate
from isotune.training.from_recipe import save
from tests.building import Built, build, build_classifier
from tests.launching import start_command

CLI = [sys.executable, "-m", "isotune.cli"]


@dataclass
class Served:
    """A server that runs: its address, a client of it, and its process."""

    url: str
    client: httpx2.Client
    process: Any

    def printed(self) -> tuple[str, str]:
        """What it has printed so far on stdout and stderr, of a fork."""
        return self.process.printed(self.process._stdout), self.process.printed(self.process._stderr)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        """A request with a JSON body."""
        return self.client.post(path, json=body, **options)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextmanager
def served(run: Path, *flags: str, timeout: float = 120) -> Iterator[Served]:
    """`isotune serve RUN` on a free port of loopback, until the block ends."""
    process = start_command([*CLI, "serve", str(run), "--port", "0", *flags])
    try:
        with httpx2.Client(base_url=address_of(process, timeout), timeout=timeout) as client:
            yield Served(str(client.base_url), client, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(30)


def address_of(process: Any, timeout: float) -> str:
    """The address that a server prints once it answers; it must begin to within `timeout` seconds."""
    ends = time.monotonic() + timeout
    while time.monotonic() < ends:
        out = process.printed(process._stdout)
        for line in out.splitlines():
            if line.startswith("serving "):
                return next(word for word in line.split() if word.startswith("http://"))
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the server did not begin:\n{process.communicate(timeout)}")


def counts_at_rest(server: Served) -> dict[str, int]:
    """The counts of requests once none waits or runs."""
    ends = time.monotonic() + 60
    while (counts := server.client.get("/health").json()["requests"])["running"] or counts["waiting"]:
        assert time.monotonic() < ends, counts
        time.sleep(0.02)
    return counts


def classifier_run(folder: Path, **keys: Any) -> Path:
    """A small classifier of opinions with its evaluation, trained in this process."""
    recipe = {
        "global_batch_size": 16,
        "microbatch_tokens": 1024,
        "max_steps": 20,
        "eval_steps": 20,
        "learning_rate": 2e-3,
    }
    built = build_classifier(folder, **{**recipe, **keys})
    return finished(built, evaluate_classifier, "--resamples", "20", "--no_pictures")


def generator_run(folder: Path, **keys: Any) -> Path:
    """A small model of greetings with its evaluation, trained in this process."""
    recipe = {"max_steps": 24, "eval_steps": 24, "global_batch_size": 8, "learning_rate": 3e-3}
    recipe |= {"microbatch_tokens": 1024}
    built = build(folder, **{**recipe, "eval_dataset_name": "builtin:greetings", **keys})
    given = ("--dataset_name", "builtin:greetings", "--max_new_tokens", "12")
    return finished(built, generate, *given)


def finished(built: Built, evaluation: ModuleType, *flags: str) -> Path:
    """The folder of a run that has been trained, saved and evaluated."""
    built.train()
    save(built.start, built.trainer)
    run = built.run.path
    AcceleratorState._reset_state(reset_partial_state=True)
    given = evaluation.read_arguments(["--run_dir", str(run), *flags], prog="eval", description="")
    getattr(evaluation, evaluation.__name__.rpartition(".")[2])(given)
    return run


def predictions_of(run: Path) -> list[dict[str, Any]]:
    """The stored predictions of a run's only evaluation by `isotune eval`."""
    (file,) = run.glob("eval/*/.evaluation.json")
    return [json.loads(line) for line in (file.parent / "predictions.jsonl").read_text().splitlines()]
