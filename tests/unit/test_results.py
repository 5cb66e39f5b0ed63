"""A result is read back as it was written, and a broken one is refused with the line that is wrong."""

import json

import pytest

from isotune.evaluation.results import find_results, read_result, rows_digest, write_result
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import UserError

FACTS = {
    "kind": "classification",
    "model": "runs/x",
    "dataset_name": "builtin:opinions",
    "dataset_split": "test",
}
PREDICTIONS = [{"id": 0, "label": 1, "probabilities": [0.25, 0.75]}, {"id": 1, "label": 0, "probabilities": [0.5, 0.5]}]


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "run" / "eval" / "test"
    write_result(where, FACTS, Scores({"accuracy": 0.5}, {"accuracy": (0.0, 1.0)}), PREDICTIONS, ["good", "bad"])
    return where


def test_a_result_comes_back_as_it_was_written(folder):
    found = read_result(folder)
    assert found.facts == {**FACTS, "rows": 2, "rows_sha256": rows_digest([(0, "good"), (1, "bad")])}
    assert found.metrics == {"accuracy": 0.5}
    assert found.intervals == {"accuracy": (0.0, 1.0)}
    assert found.predictions == PREDICTIONS
    assert find_results(folder.parents[1]) == [folder]


def test_the_metrics_stand_flat_in_the_file(folder):
    assert json.loads((folder / "metrics.json").read_text())["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"id": 0}\n{"id": 1, "lab', "line 2 is not JSON"),
        ('{"id": 0}\n', "1 rows, metrics.json says 2"),
        ('{"id": 0}\n{"id": 0}\n', "line 2: id 0 is not unique"),
        ('{"id": 0}\n{"label": 0}\n', "line 2 has no id"),
        ('{"id": 0}\n{"id": 1, "probabilities": [NaN, 1.0]}\n', "line 2: a probability is not a finite number"),
        ('{"id": 0}\n{"id": 1, "probabilities": ["a", 1.0]}\n', "line 2: a probability is not a finite number"),
    ],
)
def test_broken_predictions_are_refused(folder, text, complaint):
    (folder / "predictions.jsonl").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_result(folder)


def test_a_folder_without_a_result_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.json"):
        read_result(tmp_path)


def test_a_result_of_another_form_is_refused_with_what_it_lacks(folder):
    (folder / "metrics.json").write_text('{"accuracy": 0.5, "kind": "classification", "rows": 2}')
    with pytest.raises(UserError, match="does not say model, dataset_name, dataset_split, rows_sha256"):
        read_result(folder)


@pytest.mark.parametrize("intervals", [[], {"accuracy": [0.5]}, {"accuracy": "ab"}, {"accuracy": [0.1, None]}])
def test_an_interval_that_is_none_is_refused(folder, intervals):
    whole = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**whole, "intervals": intervals}))
    with pytest.raises(UserError, match="not each of them is a pair of numbers"):
        read_result(folder)


def test_an_undefined_metric_is_null_in_the_file_and_no_number_to_its_readers(tmp_path):
    scores = Scores({"accuracy": 0.5}, {"accuracy": (0.0, 1.0)}, ["precision[c]"])
    write_result(tmp_path, FACTS, scores, PREDICTIONS, ["good", "bad"])
    assert json.loads((tmp_path / "metrics.json").read_text())["precision[c]"] is None
    found = read_result(tmp_path)
    assert found.undefined == ["precision[c]"] and found.metrics == {"accuracy": 0.5}
    assert "precision[c]" not in found.facts


def test_a_metric_cannot_take_the_name_of_a_fact(tmp_path):
    with pytest.raises(ValueError, match="rows"):
        write_result(tmp_path, FACTS, Scores({"rows": 2.0}, {}), PREDICTIONS, ["good", "bad"])
    assert not list(tmp_path.iterdir())


def test_the_digest_sees_order_ids_and_texts():
    rows = [(0, "a"), (1, "b")]
    others = [rows[::-1], [(0, "a"), (2, "b")], [(0, "a"), (1, "c")], [(0, "a")]]
    assert all(rows_digest(rows) != rows_digest(other) for other in others)
    assert rows_digest(rows) == rows_digest(iter(rows))
