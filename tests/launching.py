"""How the tests start real runs: the shipped script, as a user starts it, in processes of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.forking import ForkedProcess, can_fork, start_forked

REPOSITORY = Path(__file__).resolve().parents[1]

TINY: dict[str, Any] = {
    "model_name_or_path": "builtin:opt-tiny",
    "dataset_name": "builtin:greetings",
    "max_seq_length": 256,
    "global_batch_size": 5,
    "tune": "full",
    "learning_rate": 1e-3,
    "max_steps": 6,
    "sample_prompt": "",
    "disable_tqdm": True,
}

TINY_CLASSIFIER: dict[str, Any] = {
    "model_name_or_path": "builtin:bert-tiny",
    "dataset_name": "builtin:opinions",
    "eval_dataset_name": "builtin:opinions",
    "max_seq_length": 64,
    "microbatch_tokens": 128,
    "global_batch_size": 7,
    "tune": "full",
    "learning_rate": 1e-3,
    "max_steps": 6,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Finished:
    """What a process left behind: its status, what it printed, and the run folder."""

    status: int
    stdout: str
    stderr: str
    run: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The training lines of metrics.jsonl."""
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation lines of metrics.jsonl."""
        return [line for line in self.lines if "eval_loss" in line]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    @property
    def collectives(self) -> list[dict[str, int]]:
        """What each rank's counted step sent, by name, with its number of passes."""
        files = sorted(self.run.parent.glob("collectives-*.jsonl"))
        return [json.loads(file.read_text().splitlines()[-1]) for file in files]

    @property
    def environment(self) -> dict[str, Any]:
        """environment.json."""
        return json.loads((self.run / "environment.json").read_text())


def start(
    folder: Path,
    recipe: dict[str, Any],
    *flags: str,
    processes: int = 0,
    config: str = "ddp.yaml",
    expect: int | None = 0,
    environment: dict[str, str] | None = None,
    port: int = 0,
    script: str = "train/sft_opt.py",
    fresh: bool = False,
) -> Finished:
    """Run `script`: as plain `python` (processes 0), or by `accelerate launch` with a shipped config.

    `recipe` is written to a file beside the run folder `folder/run`; port 0 takes a free one; asserts the exit status
    `expect`. `fresh` interpreters instead of forks: see `run_command`.
    """
    file = write_recipe(folder, recipe)
    command = [sys.executable, script]
    if processes:
        command = [*launcher(config, processes, port), command[1]]
    done = run_command([*command, "--config", str(file), *flags], environment, fresh=fresh)
    finished = Finished(done.returncode, done.stdout, done.stderr, folder / "run")
    assert expect is None or done.returncode == expect, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return finished


def start_together(
    folder: Path,
    recipes: dict[str, dict[str, Any]],
    *,
    processes: int = 0,
    config: str = "ddp.yaml",
    counted_step: int = 0,
    script: str = "train/sft_opt.py",
) -> dict[str, Finished]:
    """Run `script` once for each of `recipes`, one after the other in the processes of one launch.

    The run of `name` lies in `folder/name/run`. `counted_step` is the training step, from 1, whose collectives are
    counted: `Finished.collectives` has them.
    """
    files = [str(write_recipe(folder / name, recipe)) for name, recipe in recipes.items()]
    runner = "tests/distributed/one_after_the_other.py"
    command = [*launcher(config, processes), runner] if processes else [sys.executable, runner]
    done = run_command([*command, script, str(counted_step), *files])
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return {name: Finished(0, done.stdout, done.stderr, folder / name / "run") for name in recipes}


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    """`recipe` in a file of its own, with its run in `folder/run`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **recipe}))
    return file


def launcher(config: str, processes: int, port: int = 0) -> list[str]:
    """`accelerate launch` with a shipped configuration, or with one at an absolute path; port 0 takes a free one."""
    file = str(Path("accelerate_configs") / config)
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    return [*start, "--num_processes", str(processes), "--main_process_port", str(port)]


def run_command(
    command: list[str],
    environment: dict[str, str] | None = None,
    *,
    fresh: bool = False,
    cwd: Path = REPOSITORY,
    text: str = "",
    timeout_seconds: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, one thread a process, and wait for it.

    It is run by a fork of a process that has imported the libraries (see `tests/fork_server.py`), or, where `fresh`,
    by an interpreter of its own. `text` goes to its standard input.
    """
    if not fresh and can_fork(command):
        process = start_forked(command, surroundings_of(environment), cwd, text)
        try:
            stdout, stderr = process.communicate(timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill_group()
            raise
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    return subprocess.run(
        command,
        cwd=cwd,
        env=surroundings_of(environment),
        input=text,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout_seconds,
        check=False,
    )


def start_command(
    command: list[str], environment: dict[str, str] | None = None, *, fresh: bool = False
) -> subprocess.Popen[str] | ForkedProcess:
    """Start a command in the checkout, in a session of its own, as a terminal would, and do not wait for it.

    `fresh`: see `run_command`.
    """
    if not fresh and can_fork(command):
        return start_forked(command, surroundings_of(environment), REPOSITORY)
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=surroundings_of(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def surroundings_of(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The variables that a command of the tests sees: this process's, one thread, and `environment`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **(environment or {})}
