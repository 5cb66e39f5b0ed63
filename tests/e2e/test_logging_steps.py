"""metrics.jsonl has a line for each `logging_steps` updates: nothing of them is lost, wherever a run was stopped."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tests.building import Built, build, build_classifier

RUN: dict[str, Any] = {"max_steps": 11, "eval_steps": 5, "save_steps": 3, "save_total_limit": 50}
TIMED = ("step_seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds")
LAST = ("step", "epoch", "grad_norm", "learning_rate")


def told(lines: list[dict]) -> list[dict]:
    """What lines say of the experiment, without what is measured by a clock or of this process."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def evaluations(lines: list[dict]) -> list[dict]:
    return [line for line in told(lines) if "eval_loss" in line]


def checkpoint_of(built: Built, step: int) -> Path:
    return built.run.path / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def each(tmp_path_factory) -> list[dict]:
    """Every line of a run that writes one a step."""
    return build_classifier(tmp_path_factory.mktemp("each"), **RUN).train()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Built:
    """The same run with a line every four steps, and the last three."""
    built = build_classifier(tmp_path_factory.mktemp("sparse"), **RUN, logging_steps=4)
    built.train()
    return built


def test_by_default_every_step_has_its_line(each):
    steps = [line for line in each if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 12)) and not any("steps" in line for line in steps)


def test_a_line_of_several_steps_has_their_sums_and_the_mean_of_their_losses(each, sparse):
    steps = {line["step"]: line for line in each if "loss" in line}
    assert [(line["step"], line["steps"]) for line in sparse.steps] == [(4, 4), (8, 4), (11, 3)]
    assert evaluations(sparse.lines) == evaluations(each), "train_loss and train_accuracy are of the same steps"
    for line in sparse.steps:
        own = [steps[step] for step in range(line["step"] - line["steps"] + 1, line["step"] + 1)]
        assert list(line) == [*own[-1], "steps"]
        assert line["loss"] == float(sum(Fraction(one["loss"]) for one in own) / len(own))
        for key in ("input_tokens", "documents"):
            assert line[key] == sum(one[key] for one in own) and isinstance(line[key], int)
        right = sum(round(one["accuracy"] * one["documents"]) for one in own)
        assert line["accuracy"] == right / line["documents"]
        assert {key: line[key] for key in LAST} == {key: own[-1][key] for key in LAST}
        assert line["tokens_per_second"] == line["input_tokens"] / line["step_seconds"]


@pytest.mark.slow  # in short: test_step_sums.py
@pytest.mark.parametrize("step", [6, 9])
def test_a_run_that_goes_on_between_two_lines_writes_those_of_the_run_that_never_stopped(tmp_path, sparse, step):
    second = build_classifier(tmp_path, **RUN, logging_steps=4, resume=str(checkpoint_of(sparse, step)))
    assert told(second.train()) == told(sparse.lines)


@pytest.mark.slow  # as above, and `resume: auto` finds metrics.jsonl with half a line
def test_a_line_that_was_cut_off_is_written_whole_by_the_next_attempt(tmp_path, sparse):
    shutil.copytree(sparse.run.path, tmp_path / "run")
    for step in (9, 11):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    again = build_classifier(tmp_path, **RUN, logging_steps=4)
    assert told(again.train()) == told(sparse.lines)


@pytest.mark.slow
def test_a_checkpoint_of_a_version_that_kept_no_sums_goes_on_from_its_lines(tmp_path, each):
    first = build_classifier(tmp_path / "first", **RUN)
    first.train()
    folder = checkpoint_of(first, 9)
    state = json.loads((folder / "state.json").read_text())
    before = {key: value for key, value in state.items() if key != "metrics"}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert "metrics" in state
    from isotune.checkpoint.manifest import Manifest, record_file

    (folder / "state.json").write_text(json.dumps(before))
    files = tuple(record_file(folder, folder / file["name"]) for file in manifest.pop("files"))
    del manifest["digest"]
    Manifest(**manifest, files=files).write(folder)
    second = build_classifier(tmp_path / "second", **RUN, resume=str(folder))
    assert told(second.train()) == told(each)


@pytest.mark.slow
def test_a_share_of_the_run_the_first_step_and_an_early_end_are_lines_too(tmp_path):
    lines = build(tmp_path / "share", max_steps=10, logging_steps=0.4, logging_first_step=True).train()
    assert [(line["step"], line.get("steps", 1)) for line in lines] == [(1, 1), (4, 3), (8, 4), (10, 2)]
    assert all(math.isfinite(line["loss"]) for line in lines)
    stops = {"early_stopping_patience": 1, "early_stopping_threshold": 100.0, "eval_steps": 3}
    early = build_classifier(tmp_path / "early", **RUN | stops, logging_steps=4)
    early.train()
    assert [(line["step"], line.get("steps", 1)) for line in early.steps] == [(4, 4), (6, 2)]
