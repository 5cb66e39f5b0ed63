"""`make gpu` works where there is no GPU too, so that it works the first time where there is one."""

import json
import sys
from pathlib import Path

import pytest
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

    late = run_command([*command, "--stages", "bitwise", "--seconds", "1"])
    assert late.returncode == 1 and "stopped after 1 s" in late.stdout
