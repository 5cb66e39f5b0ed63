"""How the tests start real runs: the shipped script, as a user starts it, in processes of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
) -> Finished:
    """Run train/sft_opt.py: as plain `python` (processes 0), or by `accelerate launch` with a shipped config.

    `recipe` is written to a file beside the run folder `folder/run`; asserts the exit status `expect`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(run), **recipe}))
    command = [sys.executable, "train/sft_opt.py"]
    if processes:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}"]
        command = [*launcher, "--num_processes", str(processes), "--main_process_port", "0", command[1]]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **(environment or {})}
    done = subprocess.run(
        [*command, "--config", str(file), *flags],
        cwd=REPOSITORY,
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    finished = Finished(done.returncode, done.stdout, done.stderr, run)
    assert expect is None or done.returncode == expect, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return finished
