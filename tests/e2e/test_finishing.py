"""A run is finished when everything of it is there: killed after its model was saved, the next start does the rest."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.launching import TINY, TINY_CLASSIFIER, start, start_command, write_recipe

from isotune.config import Recipe
from isotune.io.errors import UserError
from isotune.run.finishing import FinishingStep, finish
from isotune.run.preemption import RunStatus
from isotune.run.run_dir import RunDir
from isotune.run.run_state import state_of_run

LOCAL = ["model", "loss_curve", "model_card"]


def status_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def weights_of(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "model").iterdir() if file.name != "README.md"}


def killed_when_the_model_appears(folder: Path, recipe: dict[str, Any], script: str) -> Path:
    """A run whose process got SIGKILL as soon as RUN/model was there; asserts that nothing after it was done."""
    run = folder / "run"
    process = start_command([sys.executable, script, "--config", str(write_recipe(folder, recipe))])
    deadline = time.monotonic() + 120
    while not (run / "model").is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "model" / "README.md").exists() and not (run / "loss_curve.png").exists()
    assert status_of(run)["status"] == "running"
    return run


@pytest.mark.parametrize(
    ("recipe", "script"),
    [
        pytest.param(TINY, "train/sft_opt.py", id="sft", marks=pytest.mark.slow),
        pytest.param(TINY_CLASSIFIER, "train/imdb.py", id="classification"),
    ],
)
def test_a_run_that_was_killed_after_its_model_appeared_is_finished_by_the_next_start(tmp_path, recipe, script):
    recipe = recipe | {"max_steps": 3}
    run = killed_when_the_model_appears(tmp_path, recipe, script)
    before, lines = weights_of(run), (run / "metrics.jsonl").read_text()
    assert state_of_run(run).state == "killed"
    again = start(tmp_path, recipe, script=script)
    assert "trained     " in again.stdout and "step 1" not in again.stderr
    assert weights_of(run) == before and (run / "metrics.jsonl").read_text() == lines
    assert (run / "model" / "README.md").is_file() and (run / "loss_curve.png").is_file()
    status = status_of(run)
    assert (status["status"], status["exit_status"], status["step"], status["steps"]) == ("finished", 0, 3, 3)
    assert status["finishing"] == LOCAL
    third = start(tmp_path, recipe, script=script)
    assert "nothing is left to do" in third.stdout and "loss curve" not in third.stdout


def test_a_run_says_which_steps_of_finishing_are_done(tmp_path):
    done = start(tmp_path, TINY | {"max_steps": 1, "sample_prompt": "Hello?"})
    assert status_of(done.run)["finishing"] == ["model", "loss_curve", "model_card", "sample_answer"]
    assert done.stdout.index("model       ") < done.stdout.index("loss curve") < done.stdout.index("model card")


class Run:
    """A run folder as `finish` sees it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "environment.json").write_text("{}")  # the run has begun
        self.path = folder
        self.status = RunStatus(folder, is_main=True)


def test_a_step_whose_file_is_gone_is_done_again(tmp_path):
    run: Any = Run(tmp_path / "run")
    picture, done = run.path / "picture.png", []
    steps = [
        FinishingStep("table", lambda: done.append("table")),
        FinishingStep("picture", lambda: (done.append("picture"), picture.write_bytes(b"12")), picture),
    ]
    finish(run, steps)
    finish(run, steps)
    assert status_of(run.path)["made"] == {"picture.png": 2} and done == ["table", "picture"]
    picture.unlink()
    finish(run, steps)
    assert done == ["table", "picture", "picture"] and status_of(run.path)["finishing"] == ["table", "picture"]


def test_a_step_that_failed_and_those_after_it_are_done_by_the_next_start(tmp_path):
    done: list[str] = []
    broken = [True]

    def picture() -> None:
        if broken[0]:
            raise UserError("no picture today")
        done.append("picture")

    steps = [
        FinishingStep("table", lambda: done.append("table")),
        FinishingStep("picture", picture),
        FinishingStep("sent", lambda: done.append(status_of(tmp_path / "run")["status"]), is_outside=True),
    ]
    first: Any = Run(tmp_path / "run")
    with pytest.raises(UserError, match="no picture today"):
        finish(first, steps)
    assert done == ["table"] and status_of(first.path)["finishing"] == ["table"]
    broken[0] = False
    second: Any = Run(tmp_path / "run")
    second.status.go_on()
    finish(second, steps)
    assert done == ["table", "picture", "finished"]  # what leaves the folder comes when the run counts as finished
    assert status_of(first.path)["finishing"] == ["table", "picture", "sent"]
    assert status_of(first.path)["status"] == "finished"


def test_a_model_that_is_broken_is_named_and_what_then(tmp_path):
    recipe = TINY | {"max_steps": 1}
    run = start(tmp_path, recipe).run
    status = status_of(run)
    (run / "status.json").write_text(json.dumps(status | {"status": "running", "finishing": []}))
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused = start(tmp_path, recipe, expect=2)
    (sentence,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert "model.safetensors" in sentence and "goes on from its last checkpoint" in sentence
    assert status_of(run)["status"] == "failed" and "Traceback" not in refused.stderr


def test_a_new_run_in_the_place_of_another_never_ends_with_the_model_of_that_one(tmp_path):
    recipe = TINY | {"max_steps": 1}
    run = start(tmp_path, recipe).run
    (run / "model" / "of_the_first").write_text("")
    values = {**recipe, "output_dir": str(run)}
    RunDir(Recipe.from_values(**values, resume="never")).begin({})  # and here it is killed
    (run / "status.json").write_text(json.dumps(status_of(run) | {"status": "running", "exit_status": None}))
    goes_on = RunDir(Recipe.from_values(**values))
    goes_on.check()
    assert not goes_on.is_trained and (run / "model.before" / "of_the_first").exists()
    start(tmp_path, recipe)
    assert not (run / "model.before").exists() and not (run / "model" / "of_the_first").exists()
