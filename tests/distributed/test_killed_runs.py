"""benchmarks/kills.py on a few kills: every engine once, killed and started again until it is finished."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.launching import REPOSITORY, surroundings_of

from isotune.run.malloc_tuning import GPU_DRIVERS


def run_benchmark(output: Path, *flags: str) -> tuple[str, dict[str, Any]]:
    """What it printed, and its last line."""
    command = [sys.executable, "benchmarks/kills.py", "--output_dir", str(output), *flags]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=surroundings_of(), capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or any(driver.exists() for driver in GPU_DRIVERS), reason="its processes are forks"
)
def test_runs_that_are_killed_are_finished_with_the_bits_of_those_that_are_not(tmp_path):
    said, result = run_benchmark(tmp_path, "--kills", "6")
    assert result["kills"] >= 6 and result["equal"] == result["runs"] >= 1 and result["failed_runs"] == []
    lines = [json.loads(line) for line in (tmp_path / "kills-0.jsonl").read_text().splitlines()]
    killed = [line for line in lines if line.get("reached")]
    assert {line["kind"] for line in killed} and all(line["untruths"] == [] for line in killed)
    assert "| all | " in said and not os.path.ismount(tmp_path / "disk")
    again, same = run_benchmark(tmp_path, "--kills", "6")
    assert "attempts in" not in again and same["kills"] == result["kills"], "what is on record is not done again"
