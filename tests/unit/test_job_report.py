"""The lines at the end of a job's log say what the run's own files say."""

import json
from pathlib import Path
from typing import Any

import pytest

from isotune.io.errors import UserError
from isotune.report.job import job_report


def written(run: Path, *lives: dict[str, Any], **environment: Any) -> Path:
    run.mkdir()
    facts = {
        "device": "cpu",
        "device_name": "EPYC",
        "world_size": 4,
        "in_effect": {"engine": "DeepSpeedEngine", "zero_stage": 2},
        "slurm": {"job_id": "7", "nodes": "node[1-2]"},
    }
    (run / "environment.json").write_text(json.dumps(facts | environment))
    (run / "status.json").write_text(json.dumps({"status": "finished"}))
    lines = [{"step": n, "loss": 1.0, "step_seconds": 0.5, "input_tokens": 600} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*lines, {"step": 2, "eval_loss": 1}]))
    for number, life in enumerate(lives, start=1):
        folder = run / ".lives" / f"{number:08d}-abcd.over"
        folder.mkdir(parents=True)
        beat = life.pop("beat", None)
        (folder / "life.json").write_text(json.dumps(life))
        if beat is not None:
            (folder / "heartbeat").write_text(f"3 {beat}\n")
    return run


def test_hours_are_those_of_every_life_whether_it_said_its_end_or_only_beat_until_then(tmp_path):
    lives = (
        {"host": "node1", "began": 1000.0, "processes": 2, "beat": 2800.0},  # killed: half an hour on two
        {"host": "node3", "began": 5000.0, "processes": 4, "beat": 8000.0, "ended": 8600.0},  # an hour on four
    )
    said = job_report(written(tmp_path / "run", *lives, device="cuda")).splitlines()
    assert said == [
        f"run         {tmp_path / 'run'}",
        "ended       finished after step 2",
        "nodes       node[1-2]",
        "engine      DeepSpeedEngine, ZeRO-2 on 4 x EPYC",
        "speed       1,200 tokens/s over 1 s of steps",
        "cost        5.00 GPU hours, start-up and stopped attempts included",
        "restarts    1 (led by node1, node3)",
    ]


def test_steps_are_counted_where_a_line_is_of_several(tmp_path):
    run = written(tmp_path / "run")
    lines = [{"step": n, "loss": 1.0, "step_seconds": 25.0, "input_tokens": 6000, "steps": 50} for n in (50, 100)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = job_report(run)
    assert "finished after step 100\n" in said and "240 tokens/s over 50 s of steps" in said


def test_off_slurm_and_on_a_cpu_it_says_so(tmp_path):
    life = {"host": "here", "began": 0.0, "processes": 1, "ended": 3600.0}
    said = job_report(written(tmp_path / "run", life, slurm=None))
    assert "nodes       this machine\n" in said and "1.00 process hours" in said and "restarts    0\n" in said


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run that has begun"):
        job_report(tmp_path)
