"""From which probability a text has a label: given or chosen, recorded, and used by whatever reads the model."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from tests.label_sets import rows_of, write_rows

from isotune.config import ClassificationRecipe
from isotune.data.classification.split import prepare_labelled
from isotune.data.classification.thresholds import (
    THRESHOLDS_FILE,
    choose_thresholds,
    read_thresholds,
    thresholds_of,
    write_thresholds,
)
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer

ROWS = st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])), min_size=1, max_size=12)
CHOSEN = {"task_type": "multi_label", "label_thresholds": "chosen"}


@settings(deadline=None, max_examples=40)
@given(rows=ROWS)
def test_no_threshold_has_a_better_f1_than_the_chosen_one(rows):
    truth, sure = np.array([own for own, _ in rows])[:, None].astype(int), np.array([p for _, p in rows])[:, None]
    (chosen,) = choose_thresholds(truth, sure)

    def f1(threshold: float) -> float:
        return float(f1_score(truth[:, 0], sure[:, 0] >= threshold, zero_division=0.0))

    assert 0 < chosen < 1 or not 0 < sure[sure >= chosen].min() < 1
    if truth.any():
        assert f1(chosen) == pytest.approx(max(map(f1, [*sure[:, 0], *(sure[:, 0] + 1e-6), 0.5])))
        if f1(0.5) == pytest.approx(f1(chosen)):
            assert chosen == 0.5  # nothing speaks for another one
    else:
        assert chosen == 0.5


def test_the_thresholds_of_a_model_are_found_by_the_names_of_its_labels(tmp_path):
    write_thresholds(tmp_path, [0.2, 0.8], ["sea", "rain"], 12)
    assert json.loads((tmp_path / THRESHOLDS_FILE).read_text())["chosen_on_texts"] == 12
    assert np.array_equal(read_thresholds(tmp_path, ["Rain", "sea"]), [0.8, 0.2])
    with pytest.raises(UserError, match="is of the labels sea, rain, and the model has fog, rain"):
        read_thresholds(tmp_path, ["fog", "rain"])
    assert read_thresholds(tmp_path / "other", ["a", "b"]) == 0.5
    for broken in (
        "[]",
        "{",
        '{"label_thresholds": {"sea": "0.2"}}',
        '{"label_thresholds": {"sea": NaN, "rain": 0.5}}',
    ):
        (tmp_path / THRESHOLDS_FILE).write_text(broken)
        with pytest.raises(UserError, match="does not hold label_thresholds"):
            read_thresholds(tmp_path, ["sea", "rain"])
    assert np.array_equal(thresholds_of([0.3], 2), [0.3, 0.3])


MISTAKES = [
    ({"label_thresholds": [0.3, 0.4, 0.5], "label_names": ["a", "b"]}, "say one number for each class"),
    ({"label_thresholds": [0.3, 1.0]}, "it takes a list of numbers above 0 and below 1 or chosen"),
    ({"label_thresholds": [0.3], "task_type": "regression"}, "label_thresholds are of multi_label"),
    ({"label_thresholds": "choosen"}, "did you mean chosen"),
]


@pytest.mark.parametrize(("keys", "sentence"), MISTAKES)
def test_thresholds_that_have_no_meaning_are_refused(keys, sentence):
    common = {"model_name_or_path": "x", "output_dir": "run", "dataset_name": "x", "task_type": "multi_label"}
    with pytest.raises(UserError, match=sentence):
        ClassificationRecipe.from_values(**common | keys)


def test_what_is_in_the_other_data_too_is_counted_without_the_texts_that_are_kept_back(tmp_path):
    rows = rows_of("multi_label", 120, pairs=False)
    keys = {"dataset_name": write_rows(tmp_path / "all.jsonl", rows), "output_dir": "run", **CHOSEN}
    keys |= {"eval_dataset_name": write_rows(tmp_path / "test.jsonl", rows[:100])}
    recipe = ClassificationRecipe.from_values(model_name_or_path="x", **keys)
    found = prepare_labelled(recipe, builtin_tokenizer("builtin:bert-tiny"), show=False)
    trained, tested = list(found.train.texts()), {row["text"] for row in rows[:100]}
    assert found.to_choose_on is not None and tested & set(found.to_choose_on.texts())
    counts = found.train.table.counts
    assert counts["in_the_other"]["exactly"] == sum(text in tested for text in trained)
    assert sum(counts["in_the_other"].values()) <= counts["documents"] == len(trained)


def test_texts_that_thresholds_are_chosen_on_are_neither_trained_on_nor_tested(tmp_path):
    rows = rows_of("multi_label", 120, pairs=False)
    common = {"model_name_or_path": "x", "output_dir": "run", "dataset_name": write_rows(tmp_path / "all.jsonl", rows)}
    recipe = ClassificationRecipe.from_values(**common, **CHOSEN, eval_split_share=0.2)
    found = prepare_labelled(recipe, builtin_tokenizer("builtin:bert-tiny"), show=False)
    assert found.to_choose_on is not None and found.evaluation is not None
    sets = [set(part.texts()) for part in (found.train, found.evaluation, found.to_choose_on)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len({row["text"] for row in rows})
    assert 4 <= len(found.to_choose_on.documents) <= 25
    with pytest.raises(UserError, match=r"label_thresholds: chosen: 0\.1 of the 2 rows of .* none to choose them on"):
        few = write_rows(tmp_path / "few.jsonl", rows[:2])
        other = recipe.with_values(dataset_name=few, eval_split_share=0.0)
        prepare_labelled(other, builtin_tokenizer("builtin:bert-tiny"), show=False)
