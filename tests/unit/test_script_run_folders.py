"""`isotune.callbacks`: the folder of a script's run, which `isotune runs` and `isotune report` read as any other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.launching import surroundings_of
from tests.numerics.test_drop_in import QUIET, STEPS, accuracy, bert, texts
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments
from transformers import Trainer as LibraryTrainer

import isotune
from isotune.callbacks import FinalModel, Report, RunFolder
from isotune.cli import main
from isotune.config.layers import read_file
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer
from isotune.models.finished_run import read_run
from isotune.run.run_lease import RunLease
from isotune.run.run_state import state_of_run

EVERY_STEP: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}


class Meanwhile(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.do()


def trainer(folder: Path, *callbacks: Any, kind: Any = isotune.Trainer, **args: Any) -> Any:
    arguments = TrainingArguments(str(folder / "out"), **{**QUIET, **STEPS, "learning_rate": 3e-3, **args})
    return kind(
        model=bert(0.1),
        args=arguments,
        train_dataset=texts(),
        eval_dataset=texts(13, seed=1),
        processing_class=builtin_tokenizer("builtin:bert-tiny"),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(list(words))
    assert not leaving.value.code
    return capsys.readouterr().out


def test_a_scripts_run_is_listed_reported_and_loaded(tmp_path, capsys):
    run, seen = tmp_path / "run", []

    def look() -> None:
        seen.append(state_of_run(run))
        with pytest.raises(UserError, match="is in use by process"):
            RunLease(run).check_available()

    callbacks = [Report(), RunFolder(run, dataset_name="texts"), FinalModel(), Meanwhile(2, look)]
    own = trainer(tmp_path, *callbacks, **EVERY_STEP, **BEST)
    own.train()
    history = own.state.log_history
    best = max(line["eval_accuracy"] for line in history if "eval_accuracy" in line)
    assert [(state.state, state.step, state.steps) for state in seen] == [("running", 1, 3)]
    state = state_of_run(run)
    assert (state.state, state.step, state.steps, state.task) == ("finished", 3, 3, "classification")
    assert (state.metric, state.best, state.message) == ("eval_accuracy", best, None)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line["loss"] for line in history if "loss" in line]  # which the library adds up in fp32
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(logged, rel=1e-6)
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [
        line["eval_loss"] for line in history if "eval_loss" in line
    ]
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    assert values["learning_rate"] == 3e-3 and values["dataset_name"] == "texts" and values["num_labels"] == 3
    text = (run / "recipe.yaml").read_text()
    given, _, default = text.partition("# Arguments that were given")[2].partition("# Arguments by default")
    assert "learning_rate: 0.003" in given and "adam_beta1: 0.9" in default and "learning_rate" not in default
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["in_effect"]["kind"] == "plain" and recorded["data"]["train"]["documents"] == 24
    assert recorded["isolation"]["leak"] == 0.0 and "8 rows" in recorded["guarantees"][0]
    assert "finished" in printed(capsys, "runs", str(run)) and "accuracy" in printed(capsys, "runs", str(tmp_path))
    printed(capsys, "report", str(run))
    report = (run / "report.html").read_text()
    assert "texts" in report and "isotune serve" not in report
    card = (run / "model" / "README.md").read_text()
    assert "## Arguments" in card and "learning_rate: 0.003" in card and "adam_beta1" not in card
    loaded = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert all(torch.equal(own.model.state_dict()[name], weight) for name, weight in loaded.state_dict().items())
    assert isotune.load(run).record.keys["tune"] == "full"
    for refused in (lambda: read_run(run), lambda: read_file(run / "recipe.yaml")):
        with pytest.raises(UserError, match="of a script of its own"):
            refused()


@pytest.mark.slow
def test_a_failed_training_says_why_and_one_that_goes_on_keeps_the_lines_before_its_checkpoint(tmp_path):
    def fail() -> None:
        raise ValueError("the disk of the script is gone")

    run = tmp_path / "run"
    with pytest.raises(ValueError, match="the disk of the script"):
        trainer(tmp_path, RunFolder(run), Meanwhile(3, fail), **EVERY_STEP).train()
    state = state_of_run(run)
    assert (state.state, state.message, state.step) == ("failed", "the disk of the script is gone", 2)
    assert not RunLease(run).active()
    second = trainer(tmp_path, RunFolder(run), **{**EVERY_STEP, "max_steps": 4})
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert state_of_run(run).state == "finished" and not (run / "report.html").exists()


def test_a_line_of_several_steps_ends_at_a_checkpoint_so_that_going_on_from_it_loses_none(tmp_path):
    def fail() -> None:
        raise ValueError("the disk of the script is gone")

    def lines(run: Path) -> list[dict[str, Any]]:
        found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        clock = ("step_seconds", "tokens_per_second", "peak_memory_bytes")
        return [{key: value for key, value in line.items() if key not in clock} for line in found]

    often = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(whole, RunFolder(whole), **often).train()
    with pytest.raises(ValueError, match="the disk of the script"):
        trainer(parts, RunFolder(parts), Meanwhile(3, fail), **often).train()
    trainer(parts, RunFolder(parts), **often).train(resume_from_checkpoint=str(parts / "out" / "checkpoint-2"))
    assert [(line["step"], line["documents"]) for line in lines(parts)] == [(2, 16), (3, 8), (4, 8), (6, 16)]
    assert lines(parts) == lines(whole)


def test_what_a_run_folder_cannot_do_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match="add RunFolder"):
        trainer(tmp_path, FinalModel()).train()
    with pytest.raises(UserError, match=r"RunFolder is a callback of isotune.Trainer"):
        trainer(tmp_path, RunFolder(), kind=LibraryTrainer).train()
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"model' is there, and not of an earlier run"):
        trainer(tmp_path, RunFolder(tmp_path), FinalModel()).train()
    (tmp_path / "recipe.yaml").write_text("task: sft\n")
    with pytest.raises(UserError, match="holds a run of isotune, or its recipe"):
        trainer(tmp_path, RunFolder(tmp_path)).train()
    assert not (tmp_path / "metrics.jsonl").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from isotune.callbacks import RunFolder
from tests.unit.test_script_run_folders import Meanwhile, trainer
trainer(Path(sys.argv[1]), RunFolder(sys.argv[1]), Meanwhile(2, lambda: os.kill(os.getpid(), signal.SIGKILL))).train()
"""


@pytest.mark.slow
def test_a_script_that_was_killed_is_listed_as_killed(tmp_path):
    environment = {**surroundings_of(), "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert (state_of_run(tmp_path).state, state_of_run(tmp_path).step) == ("killed", 1)
