"""`make gpu` works where there is no GPU too, so that it works the first time where there is one."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest
from tests.gpu import report
from tests.launching import run_command


@pytest.mark.parametrize("stages", [["packages", "masks"], pytest.param(["bitwise", "plan"], marks=pytest.mark.slow)])
def test_the_report_of_a_gpu_machine_runs_its_stages_and_names_what_failed(tmp_path: Path, stages: list[str]):
    command = [sys.executable, "-m", "tests.gpu.report", "--tiny", "--output", str(tmp_path)]
    done = run_command([*command, "--stages", *stages])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[: len(stages)]] == [
        [stage, "done"] for stage in stages
    ]
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    masks = [result for result in results if "equals_cpu" in result]
    assert len(masks) == 6 * ("masks" in stages) and all(result["equals_cpu"] for result in masks)
    twice = [result for result in results if result["stage"] == "bitwise"]
    wanted = [("full", True, 0), ("lora", True, 0)] if "bitwise" in stages else []
    assert [(result["tune"], result["same_loss"], result["differing"]) for result in twice] == wanted
    assert all(100 <= result["longest_document"] <= 128 for result in twice)
    assert (tmp_path / "table.md").read_text() in done.stdout

    again = run_command([*command, "--stages", stages[0]])
    repeated = [json.loads(line)["stage"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert again.returncode == 0 and sorted(repeated) == sorted(result["stage"] for result in results)

    late = run_command([*command, "--stages", "bitwise", "--seconds", "1"], fresh=True)  # a fork is done within one
    assert late.returncode == 1 and "stopped after 1 s" in late.stdout
    stopped = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"stage": "bitwise", "failed": "stopped after 1 s"} in stopped


def test_a_stage_that_takes_too_long_ends_with_what_it_started_and_keeps_its_log(tmp_path: Path):
    started = time.monotonic()
    ended = report.run_within(2, ["sh", "-c", "sleep 60 & echo $!; wait"], tmp_path / "log.txt")
    assert ended == "stopped after 2 s" and time.monotonic() - started < 30
    child = Path("/proc") / (tmp_path / "log.txt").read_text().strip() / "cmdline"  # empty from its end on
    while time.monotonic() - started < 30:
        with contextlib.suppress(FileNotFoundError):
            if child.read_text():
                time.sleep(0.05)
                continue
        break
    else:
        pytest.fail("what the stage started is still there")
    assert report.run_within(60, ["sh", "-c", "echo all; exit 3"], tmp_path / "log.txt") == "failed with status 3"
    assert (tmp_path / "log.txt").read_text() == "all\n"


def test_every_stage_has_a_limit_and_together_they_leave_a_machine_its_time():
    assert report.SECONDS.keys() == report.STAGES.keys()
    assert sum(report.SECONDS.values()) <= 8.5 * 60
