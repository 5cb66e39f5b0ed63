"""A signal at any process ends all of them after the same step, with a checkpoint; the next life loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.forking import ForkedProcess
from tests.launching import TINY, Finished, launcher, start, start_command

from isotune.checkpoint.manifest import verify

# long enough to be hit in the middle, and slow enough: the signal comes when the third step is written
LONG: dict[str, Any] = TINY | {"max_steps": 400, "save_steps": 1000, "global_batch_size": 2}


def slow(number: signal.Signals) -> Any:
    """A case for `make test-all` only."""
    return pytest.param(number, marks=pytest.mark.slow)


@dataclass
class Running:
    """A launch that is under way."""

    process: subprocess.Popen | ForkedProcess
    run: Path

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank."""
        if "launch" not in " ".join(self.process.args):
            return [psutil.Process(self.process.pid)]
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: int(child.environ().get("RANK", "0")))

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl has that many lines."""
        deadline = time.monotonic() + 120
        metrics = self.run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Wait; the exit status and what went to stderr."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    @property
    def status(self) -> dict[str, Any]:
        """status.json."""
        return json.loads((self.run / "status.json").read_text())


def begin(
    folder: Path, recipe: dict[str, Any], *, processes: int, config: str = "ddp.yaml", fresh: bool = False
) -> Running:
    """Start a launch and do not wait for it; `fresh`: see `start_command`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | {"output_dir": str(folder / "run")}))
    command = [sys.executable, "train/sft_opt.py"]
    if processes:
        command = [*launcher(config, processes), command[1]]
    command += ["--config", str(file)]
    return Running(start_command(command, fresh=fresh), folder / "run")


def assert_stopped_with_checkpoint(running: Running) -> int:
    """The checkpoint is that of the last line written; returns its step."""
    lines = [json.loads(line) for line in (running.run / "metrics.jsonl").read_text().splitlines()]
    (folder,) = (running.run / "checkpoints").iterdir()
    manifest = verify(folder)
    assert manifest.step == lines[-1]["step"] == len(lines) < 400
    status = running.status
    assert (status["status"], status["step"], status["exit_status"]) == ("preempted", manifest.step, 75)
    return manifest.step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_process_stops_with_a_checkpoint_and_status_75(tmp_path, number):
    running = begin(tmp_path, LONG, processes=0)
    running.wait_for_step(3)
    running.process.send_signal(number)
    returned, errors = running.end()
    step = assert_stopped_with_checkpoint(running)
    assert returned == 75
    assert f"stopped after step {step}: the same command goes on from" in errors
    assert "Traceback" not in errors


def test_a_signal_at_one_rank_stops_all_after_the_same_step(tmp_path):
    running = begin(tmp_path, LONG, processes=2)
    running.wait_for_step(3)
    running.ranks[1].send_signal(signal.SIGUSR1)
    returned, _ = running.end()
    assert returned != 0  # of the launcher, which says 1 for whatever a rank says
    assert_stopped_with_checkpoint(running)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2.yaml", "zero3.yaml", "fsdp2.yaml"])
def test_a_signal_at_one_rank_of_a_sharded_engine_costs_no_bit(tmp_path, config):
    short = LONG | {"max_steps": 30, "exact_gradients": False}
    whole = start(tmp_path / "whole", short, processes=2, config=config)
    running = begin(tmp_path / "stopped", short, processes=2, config=config)
    running.wait_for_step(3)
    running.ranks[1].send_signal(signal.SIGUSR1)
    running.end()
    step = assert_stopped_with_checkpoint(running)
    assert step < 30
    resumed = start(tmp_path / "stopped", short, processes=2, config=config)
    assert f"resumed     after step {step}" in resumed.stdout
    assert figures(resumed) == figures(whole)


@pytest.mark.slow
def test_the_second_ctrl_c_ends_a_launch_at_once_while_the_first_waits_for_a_step(tmp_path):
    # a step of minutes: the whole corpus again and again, in passes of one row each
    endless = LONG | {"dataset_name": repeated_greetings(tmp_path), "global_batch_size": 4000, "microbatch_tokens": 256}
    running = begin(tmp_path, endless | {"max_steps": 2}, processes=2, fresh=True)
    assert running.process.stdout is not None
    while not running.process.stdout.readline().startswith("plan "):
        assert running.process.poll() is None, running.process.communicate()
    time.sleep(5)
    ranks = running.ranks
    os.killpg(running.process.pid, signal.SIGINT)
    time.sleep(3)
    assert all(rank.is_running() for rank in ranks), "the first only asks"
    os.killpg(running.process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    running.end()


def repeated_greetings(folder: Path) -> str:
    """A corpus whose passes take minutes."""
    file = folder / "greetings.jsonl"
    line = json.dumps({"text": "### Human: " + "Say it again. " * 12 + "### Assistant: " + "Again, and again. " * 12})
    file.write_text((line + "\n") * 4000)
    return str(file)


@pytest.mark.parametrize("number", [slow(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)])
def test_a_signal_at_the_launcher_reaches_the_ranks_even_where_it_kills_the_launcher(tmp_path, number):
    running = begin(tmp_path, LONG, processes=2, fresh=True)
    running.wait_for_step(3)
    ranks = running.ranks
    running.process.send_signal(number)
    running.process.wait(60)
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert_stopped_with_checkpoint(running)


def figures(finished: Finished) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in finished.steps]


def test_the_next_life_ends_as_if_there_had_been_one(tmp_path):
    short = LONG | {"max_steps": 40, "global_batch_size": 1}
    whole = start(tmp_path / "whole", short)
    running = begin(tmp_path / "stopped", short, processes=0)
    running.wait_for_step(5)
    running.process.send_signal(signal.SIGTERM)
    returned, errors = running.end()
    step = json.loads((running.run / "status.json").read_text())["step"]
    assert returned == 75 and 5 <= step < 40
    assert f"stopped after step {step}: the same command goes on from" in errors
    resumed = start(tmp_path / "stopped", short)
    assert f"resumed     after step {step}" in resumed.stdout
    assert figures(resumed) == figures(whole)
    (one,), (other,) = (list(run.run.glob("model/*.safetensors")) for run in (resumed, whole))
    assert one.read_bytes() == other.read_bytes()
    assert json.loads((resumed.run / "status.json").read_text())["status"] == "finished"
