"""Which evaluation is replayed before a classifier is served: one whose rows were read as requests are."""

import json
import os
from functools import partial
from types import SimpleNamespace

import pytest

from isotune.evaluation.results import CLAIM, CLASSIFICATION, METRICS, write_result
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import UserError
from isotune.serving.classification.replay import why_not
from isotune.serving.replay import newest_evaluation

SERVED = SimpleNamespace(
    settings=SimpleNamespace(max_seq_length=64, overlong="head"), thresholds=[0.5, 0.25], num_labels=2
)


def evaluated(run, name, number, *, thresholds=(0.5, 0.25), **claim):
    """A result of these thresholds, `number` seconds after the first."""
    folder = run / "eval" / name
    facts = {"kind": CLASSIFICATION, "model": "m", "dataset_name": "d", "dataset_split": None}
    facts |= {"task_type": "multi_label", "label_thresholds": list(thresholds)}
    row = {"id": 0, "label": [0], "prediction": [0], "probabilities": [0.9, 0.1]}
    write_result(folder, facts, Scores({"f1_micro": 1.0}, {}), [row], ["a text"])
    (folder / CLAIM).write_text(json.dumps({"dtype": "float32", "max_seq_length": None, "overlong": None, **claim}))
    os.utime(folder / METRICS, (1e9 + number, 1e9 + number))
    return folder


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"max_seq_length": 8}, "its max_seq_length is 8, and 64 is served"),
        ({"overlong": "tail"}, "its overlong is tail, and head is served"),
        ({"thresholds": (0.5, 0.5)}, "its label_thresholds are [0.5, 0.5], and [0.5, 0.25] are served"),
        ({"thresholds": (0.25,)}, "its label_thresholds are [0.25], and"),
        ({"thresholds": (0.5, 0.25, 0.5)}, "its label_thresholds are [0.5, 0.25, 0.5], and"),
        ({"dtype": "bfloat16"}, "its dtype is bfloat16"),
    ],
)
def test_an_evaluation_with_settings_that_requests_do_not_have_is_not_replayed(tmp_path, other, says):
    serves = partial(why_not, classifier=SERVED)
    evaluated(tmp_path, "other", 2, **other)
    with pytest.raises(UserError, match="has no evaluation to replay") as refused:
        newest_evaluation(tmp_path, CLASSIFICATION, serves)
    assert f"(other: {says}" in str(refused.value)
    same = evaluated(tmp_path, "same", 1, max_seq_length=64, overlong="head")
    assert newest_evaluation(tmp_path, CLASSIFICATION, serves).result.folder == same
