"""A sweep of real runs: from the command line to its last sentence, and the same after it was stopped and killed."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.launching import TINY, TINY_CLASSIFIER, run_command, start, start_command
from tests.slurm.jobs import bits

from isotune.io.variables import PAUSE
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
def test_trials_that_run_at_once_and_were_stopped_end_as_those_that_were_not(tmp_path):
    more = ["--trials", "2", "--parallel", "2"]
    whole = run_command([*command(tmp_path / "whole"), *more], fresh=True, timeout_seconds=1800)
    assert whole.returncode == 0, whole.stderr
    words, sweep = [*command(tmp_path / "broken"), *more], tmp_path / "broken/sweep"
    assert stop_in(sweep / "trial-002/seed-42", words, signal.SIGTERM) == 75
    states = {state_of_run(sweep / f"trial-00{number}/seed-42").state for number in (1, 2)}
    assert "preempted" in states and states <= {"preempted", "finished", "not started"}
    again = run_command(words, fresh=True, timeout_seconds=1800)
    assert again.returncode == 0, again.stderr
    found, other = (json.loads((tmp_path / name / "sweep/sweep.json").read_text()) for name in ("whole", "broken"))
    assert found == other
    assert "resumed     after step" in "".join(file.read_text() for file in (sweep / "logs").iterdir())


EPOCHS = {"num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        ({"max_steps": 20, "eval_strategy": "steps", "eval_steps": 5}, 0),
        ({"max_steps": 20, "eval_strategy": "steps", "eval_steps": 5}, 2),
        ({"max_steps": -1, **EPOCHS}, 0),
        ({"max_steps": -1, **EPOCHS, "early_stopping_patience": 1, "learning_rate": 0.1}, 0),
        ({"max_steps": -1, **EPOCHS, "early_stopping_patience": 2, "learning_rate": 0.03}, 0),
    ],
)
def test_a_run_that_pauses_at_evaluations_has_the_bits_of_one_that_does_not(tmp_path, changes, processes):
    recipe = {**TINY_CLASSIFIER, "exact_gradients": True, "global_batch_size": 60, **changes}
    recipe = {key: value for key, value in recipe.items() if (key, value) != ("max_steps", -1)}
    whole = start(tmp_path / "whole", recipe, script="train/yelp.py")
    for number in (1, 2, 3):
        part = start(
            tmp_path / "parts", recipe, script="train/yelp.py", processes=processes, environment={PAUSE: str(number)}
        )
        steps = [line["step"] for line in part.evaluations]
        if len(whole.evaluations) <= number:  # it stops early
            break
        assert len(steps) == number and state_of_run(part.run).state == "paused"
        assert part.lines[-1]["step"] == steps[-1] and not (part.run / "model").exists()
    last = start(tmp_path / "parts", recipe, script="train/yelp.py", processes=processes)
    assert state_of_run(last.run).state == "finished" and bits(last.run) == bits(whole.run)


@pytest.mark.slow
def test_a_sweep_with_pruning_trains_the_better_trial_alone_to_its_end(tmp_path):
    (tmp_path / "run").mkdir()
    recipe = {
        **RECIPE,
        "max_steps": 40,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    words = [
        str(tmp_path / "mine.yaml"),
        "--learning_rate",
        "1e-7,1e-2",
        "--seeds",
        "2",
        "--parallel",
        "2",
        "--pruning",
    ]
    words = [sys.executable, "-m", "isotune.cli", "sweep", *words, "--output_dir", str(tmp_path / "sweep")]
    done = run_command(words, fresh=True, timeout_seconds=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())
    trials = {trial["values"]["learning_rate"]: trial for trial in found["trials"]}
    evaluations = {}
    for rate in (1e-7, 1e-2):
        run = tmp_path / "sweep" / trials[rate]["folder"] / "seed-42"
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        evaluations[rate] = [line["eval_loss"] for line in lines if "eval_loss" in line]
    better, worse = sorted(evaluations, key=lambda rate: evaluations[rate][0])
    run = tmp_path / "sweep" / trials[worse]["folder"] / "seed-42"
    assert trials[worse]["pruned"] == {"step": 10, "value": evaluations[worse][0]} and len(evaluations[worse]) == 1
    assert found["trials"][-1] == trials[worse]
    assert state_of_run(run).state == "paused" and not run.with_name("seed-43").exists()
    assert trials[better]["pruned"] is None and len(trials[better]["scores"]) == 2
    again = run_command(words, fresh=True, timeout_seconds=1800)
    assert again.returncode == 0 and json.loads((tmp_path / "sweep/sweep.json").read_text()) == found


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
