"""A rank that dies or hangs takes the launch down, within a bound and with a status that is not zero."""

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from tests.launching import TINY, launcher, start, start_command, write_recipe

ENDLESS = {**TINY, "max_steps": 100_000, "save_strategy": "no", "tune": "lora", "global_batch_size": 2}


def rank_of(recipe: Path, rank: int) -> int:
    """The process id of a rank of the launch that runs this recipe."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(recipe).encode() in command and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"rank {rank} is not there")


def lose_rank_1(folder: Path, how: signal.Signals, flags: list[str], limit_seconds: float) -> tuple[int, str]:
    """Start two ranks, send `how` to rank 1 when both train; returns the launch's status and what it printed."""
    recipe = write_recipe(folder, ENDLESS)
    launch = start_command([*launcher("ddp.yaml", 2), "train/sft_opt.py", "--config", str(recipe), *flags])
    try:
        metrics = folder / "run" / "metrics.jsonl"
        for _ in range(600):
            if metrics.is_file() and len(metrics.read_text().splitlines()) > 50:  # each has told the others
                break
            assert launch.poll() is None, launch.communicate()
            time.sleep(0.1)
        lost = rank_of(recipe, 1)
        os.kill(lost, how)
        printed = "".join(launch.communicate(limit_seconds))
    finally:
        if launch.poll() is None:
            os.killpg(launch.pid, signal.SIGKILL)
    for _ in range(50):
        if not Path(f"/proc/{lost}/cmdline").is_file() or not Path(f"/proc/{lost}/cmdline").read_bytes():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the lost rank is still there")
    return launch.returncode, printed


@pytest.mark.slow  # in short: TestEnds of tests/e2e/test_command_runs.py
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the rank in /proc")
def test_a_rank_that_dies_ends_the_launch_and_is_named(tmp_path: Path):
    status, said = lose_rank_1(tmp_path, signal.SIGKILL, [], limit_seconds=45)
    assert status != 0
    assert "rank      : 1" in said and "SIGKILL" in said
    assert f"error: rank 1 on {socket.gethostname()} is gone, killed or cut off: last in step " in said
    assert not (tmp_path / "run" / "model").exists()


def test_an_unexpected_error_of_one_rank_is_one_sentence_and_its_traceback_is_in_its_log(tmp_path: Path):
    recipe = {**TINY, "save_strategy": "no", "tune": "lora"}
    done = start(tmp_path, recipe, processes=2, script="tests/distributed/failing_rank.py", expect=1)
    host = socket.gethostname()
    sentence = f'rank 1 on {host} failed with KeyError: "a bug of nobody\'s input"; its traceback is in '
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == f"error: {sentence}{done.run / 'logs/rank-1.log'}"
    assert "nobody's input" not in done.stderr.replace(said, ""), "the terminal has no traceback of it"
    logs = [(done.run / f"logs/rank-{rank}.log").read_text() for rank in range(2)]
    for rank, log in enumerate(logs):
        assert f" rank {rank} of 2 on {host}, process " in log.splitlines()[0]
    assert "Traceback (most recent call last):" in logs[1] and "failing_rank.py" in logs[1]
    assert "KeyError" in logs[1] and "failing_rank.py" not in logs[0]
    ended = json.loads((done.run / "status.json").read_text())
    assert (ended["status"], ended["exit_status"]) == ("failed", 1) and ended["message"].startswith(sentence)


def test_a_launch_that_failed_before_its_first_step_can_be_started_again(tmp_path: Path):
    """All that it left is the log of its ranks."""
    recipe = {**TINY, "save_strategy": "no", "max_steps": 1}
    folder = tmp_path / "at-the-start"
    first = start(folder, recipe, processes=2, script="tests/distributed/failing_rank.py", expect=1)
    (said,) = [line for line in first.stderr.splitlines() if line.startswith("error: rank ")]
    assert f"on {socket.gethostname()} failed with KeyError" in said, "one of the ranks says it"
    assert [path.name for path in first.run.iterdir() if not path.name.startswith(".")] == ["logs"]
    again = start(folder, recipe, processes=2)
    assert len(again.steps) == 1 and (again.run / "logs").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the rank in /proc")
def test_a_rank_that_hangs_is_named_and_everybody_ends_within_the_bound(tmp_path: Path):
    # the launcher gives a stopped process another 30 s before it kills it
    status, said = lose_rank_1(tmp_path, signal.SIGSTOP, ["--ddp_timeout", "8"], limit_seconds=8 + 30 + 20)
    assert status != 0
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    # both limits are the same, and either may be noticed first
    seen = "no rank has made progress|a rank shows no sign of life"
    where = f"rank 1 on {re.escape(socket.gethostname())} hangs in step"
    assert re.fullmatch(rf"error: ({seen}) for 8 s \(ddp_timeout\): {where} \d+, and the others wait", sentence)
