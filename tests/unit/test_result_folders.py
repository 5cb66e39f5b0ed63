"""No evaluation is written over another one."""

import json
from dataclasses import fields

import numpy as np
import pytest

from isotune.evaluation.results import CLAIM, METRICS, claim_folder, named_identity
from isotune.evaluation.tasks import PAIR, ROW_COLUMNS, ClassificationTask, GenerationTask
from isotune.io.errors import UserError

NORTH = {"dataset_name": "north/test.jsonl", "data": "n", "limit": None, "decoding": {"temperature": 0.0}}
OTHERS = [
    {**NORTH, "dataset_name": "south/test.jsonl", "data": "s"},
    {**NORTH, "limit": 5},
    {**NORTH, "decoding": {"temperature": 0.7}},
    {**NORTH, "model": "/somewhere/else"},
]


def finish(folder):
    (folder / METRICS).write_text("{}")
    return folder


def test_each_evaluation_has_a_folder_of_its_own_and_finds_it_again(tmp_path):
    place = tmp_path / "eval" / "test"
    every = [NORTH, *OTHERS]
    folders = [finish(claim_folder(place, one, is_named=False)) for one in every]
    assert folders[0] == place and len(set(folders)) == len(every)
    assert all(folder.name.startswith("test-") and folder.parent == place.parent for folder in folders[1:])
    assert [claim_folder(place, one, is_named=False) for one in reversed(every)] == folders[::-1]


def test_the_same_content_under_another_name_is_the_same_evaluation(tmp_path):
    claim_folder(tmp_path / "test", NORTH, is_named=False)
    assert claim_folder(tmp_path / "test", {**NORTH, "dataset_name": "moved"}, is_named=False) == tmp_path / "test"


@pytest.mark.parametrize(
    ("other", "said"),
    zip(
        OTHERS,
        [
            "of north/test.jsonl, and this one is of south/test.jsonl",
            "limit: null there, 5 here",
            "decoding: ",
            "model: ",
        ],
        strict=True,
    ),
)
def test_a_folder_that_the_user_named_is_refused_with_the_difference(tmp_path, other, said):
    claim_folder(tmp_path / "out", NORTH, is_named=True)
    assert claim_folder(tmp_path / "out", NORTH, is_named=True) == tmp_path / "out"
    with pytest.raises(UserError, match="holds another evaluation") as caught:
        claim_folder(tmp_path / "out", other, is_named=True)
    assert said in str(caught.value)
    assert json.loads((tmp_path / "out" / CLAIM).read_text())["dataset_name"] == "north/test.jsonl"


def test_a_result_that_does_not_say_what_it_is_of_is_kept(tmp_path):
    (tmp_path / "test").mkdir()
    finish(tmp_path / "test")
    assert claim_folder(tmp_path / "test", NORTH, is_named=False) != tmp_path / "test"
    with pytest.raises(UserError, match="holds another evaluation: choose"):
        claim_folder(tmp_path / "test", NORTH, is_named=True)


def test_a_process_that_writes_nothing_finds_the_same_folder(tmp_path):
    assert claim_folder(tmp_path / "test", NORTH, is_named=False, write=False) == tmp_path / "test"
    assert not (tmp_path / "test").exists()
    claim_folder(tmp_path / "test", NORTH, is_named=False)
    beside = claim_folder(tmp_path / "test", OTHERS[0], is_named=False, write=False)
    assert beside == claim_folder(tmp_path / "test", OTHERS[0], is_named=False)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (ClassificationTask, {PAIR: "second", "label_thresholds": (0.3,), "label_source": "rules"}),
        (GenerationTask, {}),
    ],
)
def test_every_key_of_a_task_but_the_word_that_lets_it_run_tells_evaluations_apart(kind, keys):
    told_by_content = {"dataset_mixture", "mixture_seed"}
    given = {name: "x" for name in ("dataset_name", *ROW_COLUMNS) if name in {own.name for own in fields(kind)}}
    decisive = kind(**given, **keys).decisive()
    assert (
        not {PAIR, "label_thresholds", "label_source"} & kind(dataset_name="x").decisive().keys()
    )  # as before there were these
    assert decisive.keys() == {own.name for own in fields(kind)} - {"allow_dropped"} - told_by_content
    json.dumps(decisive)
    if kind is GenerationTask:  # a key that nobody gives leaves the folders of earlier versions as they are
        assert not kind(dataset_name="x").decisive().keys() & set(ROW_COLUMNS)


def test_a_folder_with_predictions_that_nobody_claims_is_left_alone(tmp_path):
    own = tmp_path / "eval" / "step-00000002"
    own.mkdir(parents=True)
    (own / "predictions.jsonl").write_text("{}\n")  # of a training run
    assert claim_folder(own, NORTH, is_named=False).name.startswith("step-00000002-")
    with pytest.raises(UserError, match="holds another evaluation"):
        claim_folder(own, NORTH, is_named=True)


def test_a_model_whose_weights_were_replaced_is_another_one(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    weights = np.random.default_rng(0).random(300_000, np.float32)
    for folder in (model, run / "model"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(weights.tobytes())
        (folder / "config.json").write_text("{}")
    first = {**NORTH, **named_identity(None, str(model), "out")}
    of_run = named_identity(str(run), None, "out")
    assert of_run["weights"] == first["weights"] and of_run["run_dir"] == str(run)
    claim_folder(tmp_path / "out", first, is_named=True)
    (model / "config.json").write_text("{ }")  # and whatever else lies beside the weights
    assert {**NORTH, **named_identity(None, str(model), "out")} == first
    for changed in (weights + np.float32(1e-6), weights[:-1]):
        (model / "model.safetensors").write_bytes(changed.tobytes())
        with pytest.raises(UserError, match=r"out holds another evaluation \(of a model with other weights\)"):
            claim_folder(tmp_path / "out", {**NORTH, **named_identity(None, str(model), "out")}, is_named=True)
    # in the run's own folder its results go with it, and are what they were in earlier versions
    assert named_identity(str(run), None, None) == {"model": None}
    assert named_identity(None, "someone/model", None) == {"model": "someone/model"}
