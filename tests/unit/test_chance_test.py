"""The verdict on an accuracy, and how often the negative control cries wolf: at most as often as it says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isotune.data.contents import content_digest, normalised, random_labels
from isotune.evaluation.classification.chance_test import ChanceTest, accuracy_against_chance, write_chance_test
from isotune.evaluation.results import read_result
from isotune.io.errors import RunFault, UserError


@pytest.fixture(scope="module")
def contents(shared_data):
    lines = (shared_data / "yelp" / "test.jsonl").open(encoding="utf-8")
    return np.array([content_digest(normalised(json.loads(line)["text"])) for line in lines], np.uint64)


def alarms(contents, predict, seeds: int = 300) -> float:
    """The share of seeds whose control differs from chance; `predict(seed, labels)` gives 0 or 1, [rows]."""
    found = 0
    for seed in range(seeds):
        labels = random_labels(seed, contents)
        found += accuracy_against_chance(predict(seed, labels) == labels, contents, 0.5).differs
    return found / seeds


@pytest.mark.parametrize(("right", "texts"), [(0, 5), (9, 17), (13, 17), (17, 17), (480, 1000), (532, 1000)])
def test_the_interval_and_the_test_are_those_of_statsmodels(right, texts):
    from statsmodels.stats.proportion import binom_test, proportion_confint

    verdict = accuracy_against_chance(np.arange(texts) < right, np.arange(texts), 0.5)
    assert verdict.interval == pytest.approx(proportion_confint(right, texts, method="beta"), abs=1e-9)
    assert verdict.p_value == pytest.approx(binom_test(right, texts, 0.5), rel=1e-9)
    assert verdict.differs == (verdict.p_value < 0.05)
    assert (verdict.right, verdict.texts, verdict.accuracy) == (right, texts, right / texts)


def test_a_verdict_says_what_it_rests_on():
    assert str(accuracy_against_chance(np.arange(17) < 9, np.arange(17), 0.5)) == (
        "accuracy 0.529 (9 of 17 texts), 95% interval 0.278 to 0.770: not different from chance (0.500)"
    )
    assert str(accuracy_against_chance(np.arange(17) < 16, np.arange(17), 0.5)).endswith(
        "different from chance (0.500), better"
    )
    assert str(accuracy_against_chance(np.arange(17) < 1, np.arange(17), 0.5)).endswith(
        "different from chance (0.500), worse"
    )


@pytest.mark.parametrize("rows", [15, 1000])
def test_whatever_a_model_without_a_leak_predicts_the_control_is_quiet_in_at_least_95_of_100_runs(contents, rows):
    guesses = np.random.default_rng(0).integers(0, 2, rows)
    # the exact share is 3.5% of runs with 15 rows and 4.6% with 1000; 300 runs have a deviation of 1.2%
    assert 0 < alarms(contents[:rows], lambda seed, labels: guesses) < 0.083


def test_a_model_that_was_told_one_label_in_five_raises_the_alarm(contents):
    def told(seed, labels):
        guesses = np.random.default_rng(seed).integers(0, 2, len(labels))
        return np.where(np.arange(len(labels)) % 5 == 0, labels, guesses)

    assert alarms(contents, told, seeds=50) > 0.9


def test_the_best_of_ten_evaluations_would_cry_wolf_where_the_last_is_quiet(contents):
    def best_of_ten(seed, labels):
        epochs = np.random.default_rng(seed).integers(0, 2, (10, len(labels)))
        return epochs[np.argmax((epochs == labels).sum(axis=1))]

    assert alarms(contents[:100], best_of_ten) > 0.1


def test_a_text_counts_once_however_many_rows_hold_it(contents):
    rows = np.repeat(contents[:50], 10)
    assert alarms(rows, lambda seed, labels: np.zeros(len(labels), int)) < 0.083
    assert accuracy_against_chance(np.ones(500, bool), rows, 0.5).texts == 50


ROWS = 60  # twenty texts in three rows each, whose predictions are equal


def finished(run: Path, right: int, label_source: str = "random", **more: Any) -> tuple[Any, Any]:
    """A run whose last evaluation has `right` of twenty texts right, and an earlier one that has none; its parts."""
    texts = np.arange(ROWS) // 3
    labels = (texts % 4 == 0).astype(int)  # a quarter of them
    for step, count in (("00000002", 0), ("00000010", right)):
        predictions = np.where(texts < count, labels, 1 - labels)
        lines = [
            {"id": int(10 * i), "label": int(labels[i]), "prediction": int(predictions[i]), "probabilities": [0.5, 0.5]}
            for i in range(ROWS)
        ]
        folder = run / "eval" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {"label_source": "".join(list(label_source)), "dataset_name": "data", "dataset_split": "train"}
    recipe |= {"eval_dataset_name": None, "eval_dataset_split": "test"} | more
    documents = SimpleNamespace(ids=10 * np.arange(ROWS), columns={"contents": texts.astype(np.uint64)})
    evaluation = SimpleNamespace(documents=documents, class_names=["no", "yes"], texts=lambda: map(str, texts))
    return SimpleNamespace(**recipe), evaluation


@pytest.mark.parametrize(("right", "alarm"), [(10, False), (14, False), (17, True), (3, True)])
def test_the_last_evaluation_of_a_control_is_tested_and_written(tmp_path, right: int, alarm: bool):
    given = finished(tmp_path, right)
    if alarm:
        with pytest.raises(
            RunFault, match=rf"raises the alarm: labels are random, and yet accuracy {right / 20:.3f} "
        ) as said:
            write_chance_test(tmp_path, *given)
        assert str(said.value).endswith(f"({tmp_path / 'eval' / 'chance'})")
    else:
        test = write_chance_test(tmp_path, *given)
        assert (test.right, test.texts, test.chance) == (right, 20, 0.5)
    found = read_result(tmp_path / "eval" / "chance")
    assert found.facts["alarm"] == ("the pipeline leaks" if alarm else None)
    assert (found.facts["judged"], found.facts["label_source"]) == ("step-00000010", "random")
    assert (found.facts["dataset_name"], found.facts["dataset_split"]) == ("data", "train")
    assert found.metrics["accuracy"] == right / 20 and found.metrics["chance"] == 0.5
    assert found.intervals["accuracy"][0] < right / 20 < found.intervals["accuracy"][1]
    assert len(found.predictions) == ROWS


@pytest.mark.parametrize("label_source", ["data", "zeros"])
def test_chance_on_real_labels_is_the_largest_class_and_no_alarm(tmp_path, label_source: str):
    given = finished(tmp_path, 3, label_source, eval_dataset_name="held_out")
    test = write_chance_test(tmp_path, *given)
    assert test.chance == 0.75 and test.differs
    facts = read_result(tmp_path / "eval" / "chance").facts
    assert facts["alarm"] is None and (facts["dataset_name"], facts["dataset_split"]) == ("held_out", "test")


def test_a_chance_at_an_end_of_the_interval_is_within_it():
    for interval in ((0.5, 0.7), (0.3, 0.5)):
        assert not ChanceTest(3, 5, 0.5, interval, 0.05).differs


def test_other_rows_and_no_evaluation_are_refused(tmp_path):
    recipe, evaluation = finished(tmp_path, 10)
    last = tmp_path / "eval" / "step-00000010" / "predictions.jsonl"
    for ids in (evaluation.documents.ids[::-1], evaluation.documents.ids + 1, evaluation.documents.ids - 1):
        evaluation.documents.ids = ids
        with pytest.raises(UserError, match=f"^{last} has other rows than the evaluation data, or in another order$"):
            write_chance_test(tmp_path, recipe, evaluation)
    with pytest.raises(UserError, match="has no evaluation to test: eval_strategy is no"):
        write_chance_test(tmp_path / "eval", recipe, evaluation)
