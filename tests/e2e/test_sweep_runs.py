"""A sweep of real runs: from the command line to its last sentence, and the same after it was stopped and killed."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.launching import TINY, TINY_CLASSIFIER, run_command, start_command

from isotune.run.run_state import state_of_run

RECIPE: dict[str, Any] = {
    **TINY_CLASSIFIER,
    "task": "classification",
    "max_steps": 120,
    "metric_for_best_model": "eval_loss",
}
SEARCH = ["--learning_rate", "1e-4..1e-2", "--weight_decay", "0,0.1", "--trials", "1", "--seeds", "1"]


def command(folder: Path) -> list[str]:
    """The sweep of the recipe in a folder, whose output is in its `sweep`."""
    folder.mkdir(exist_ok=True)
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "run")}))
    return [sys.executable, "-m", "isotune.cli", "sweep", str(file), *SEARCH, "--output_dir", str(folder / "sweep")]


def stop_in(run: Path, words: list[str], number: int) -> int:
    """Start a sweep, send it a signal in the middle of this run, and give its exit status."""
    process = start_command(words, fresh=True)
    end = time.monotonic() + 300
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=300)
    while state_of_run(run).state == "running":  # it writes a checkpoint when its sweep is gone
        assert time.monotonic() < end
        time.sleep(0.1)
    assert process.returncode is not None
    return process.returncode


@pytest.mark.slow
def test_a_sweep_that_was_stopped_and_killed_ends_as_the_whole_one(tmp_path):
    whole = run_command(command(tmp_path / "whole"), fresh=True, timeout_seconds=1800)
    assert whole.returncode == 0, whole.stderr
    found = json.loads((tmp_path / "whole/sweep/sweep.json").read_text())
    first, second = sorted(found["trials"], key=lambda trial: trial["number"])
    assert first["values"] == {"learning_rate": 1e-3, "weight_decay": 0.0}
    assert 1e-4 <= second["values"]["learning_rate"] <= 1e-2 and second["values"]["weight_decay"] in (0, 0.1)
    for trial in (first, second):  # what is ranked is what the run's own file says of its last evaluation
        run = tmp_path / "whole/sweep" / trial["folder"] / "seed-42"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert trial["scores"] == [[line["eval_loss"] for line in lines if "eval_loss" in line][-1]]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == second["values"]["learning_rate"] and recipe["eval_split_share"] == 0.1
    assert found["winner"] == min((first, second), key=lambda trial: trial["scores"])["folder"]
    assert found["examined"]["count"] == 120 and found["verdict"] in whole.stdout
    result = tmp_path / "whole/sweep" / found["winner"] / "seed-42/eval/sweep_test/metrics.json"
    examined = json.loads(result.read_text())
    assert examined["dataset_split"] == "test" and found["examined"]["winner"] == [examined["log_loss"]]
    assert (tmp_path / "whole/sweep/ranking.png").is_file()

    words, sweep = command(tmp_path / "broken"), tmp_path / "broken/sweep"
    assert stop_in(sweep / "trial-000/seed-42", words, signal.SIGTERM) == 75
    assert state_of_run(sweep / "trial-000/seed-42").state == "preempted"
    assert stop_in(sweep / "trial-001/seed-42", words, signal.SIGKILL) == -signal.SIGKILL
    assert state_of_run(sweep / "trial-001/seed-42").state == "preempted"
    before = (sweep / "trial-000/seed-42/metrics.jsonl").stat().st_mtime_ns
    again = run_command(words, fresh=True, timeout_seconds=1800)
    assert again.returncode == 0, again.stderr
    assert (sweep / "trial-000/seed-42/metrics.jsonl").stat().st_mtime_ns == before
    other = json.loads((sweep / "sweep.json").read_text())
    assert {**other, "examined": None} == {**found, "examined": None}
    assert other["examined"] == found["examined"]


@pytest.mark.slow
def test_a_language_model_is_searched_and_tested_on_rows_that_are_named(tmp_path):
    turns = [("Greet Ada in Dutch.", "Goedemorgen, Ada!"), ("Greet Ken in French.", "Bonjour, Ken!")]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"eval_dataset_name": "builtin:greetings", "eval_strategy": "epoch", "num_train_epochs": 1}
    recipe = {**{key: value for key, value in TINY.items() if key != "max_steps"}, **data, "task": "sft"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    words = [str(tmp_path / "mine.yaml"), "--learning_rate", "1e-5,1e-3", "--seeds", "1"]
    words += ["--test_dataset_name", str(tmp_path / "held.jsonl"), "--output_dir", str(tmp_path / "sweep")]
    done = run_command([sys.executable, "-m", "isotune.cli", "sweep", *words], fresh=True, timeout_seconds=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())
    # the recipe has 1e-3 itself, so one value is left to try, at which nothing is learnt
    assert {trial["number"]: trial["values"] for trial in found["trials"]} == {
        0: {"learning_rate": 1e-3},
        1: {"learning_rate": 1e-5},
    }
    assert found["winner"] == "trial-000" and found["trials"][0]["mean"] < found["trials"][1]["mean"]
    examined = json.loads((tmp_path / "sweep/trial-000/seed-42/eval/sweep_test/metrics.json").read_text())
    assert examined["rows"] == 2 and found["examined"]["winner"] == [examined["perplexity"]]
    assert "1 of 20 trials: there are no more values to try" in done.stdout
    assert "No trial has a better loss than the default" in done.stdout
