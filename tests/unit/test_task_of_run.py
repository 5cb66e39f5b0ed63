"""What a run is evaluated on where the command line names no data: its own evaluation data, and no other rows."""

from types import SimpleNamespace
from typing import Any

import pytest

from isotune.evaluation.models import task_of_run
from isotune.io.errors import UserError

SHARE = {"dataset_name": "d", "dataset_split": "train", "eval_split_share": 0.1, "seed": 7}
MIXTURE = {"eval_dataset_mixture": [{"dataset_name": "a"}, {"dataset_name": "b"}], "seed": 7}


def task(settings: dict[str, Any], **flags: Any):
    classifier: Any = SimpleNamespace(name="runs/mine", run=SimpleNamespace(settings=settings))
    return task_of_run(classifier, flags)


def test_a_share_is_of_the_split_that_the_run_was_trained_on_and_of_no_other():
    for flags in ({}, {"dataset_split": "train"}, {"dataset_text_field": "review"}):
        found, held_out = task(SHARE, **flags)
        assert (found.dataset_name, found.dataset_split, held_out) == ("d", "train", (0.1, 7))
    for flag in ("dataset_split", "dataset_config", "dataset_revision"):
        with pytest.raises(UserError, match=f"--{flag} test needs --dataset_name: .* that it was not trained on"):
            task(SHARE, **{flag: "test"})


def test_one_split_or_configuration_of_several_data_sets_is_refused():
    found, held_out = task(MIXTURE)
    assert [entry["dataset_name"] for entry in found.dataset_mixture] == ["a", "b"] and held_out is None
    for flag in ("dataset_split", "dataset_config", "dataset_revision"):
        with pytest.raises(UserError, match=f"--{flag} test needs --dataset_name: .* several data sets"):
            task(MIXTURE, **{flag: "test"})


def test_a_named_evaluation_set_may_be_read_by_another_split():
    own = {"eval_dataset_name": "e", "eval_dataset_split": "test", "eval_dataset_config": "c", "seed": 7}
    found, held_out = task(own, dataset_split="validation")
    assert (found.dataset_name, found.dataset_split, found.dataset_config, held_out) == ("e", "validation", "c", None)
