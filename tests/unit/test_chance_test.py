"""The verdict on an accuracy, and how often the negative control cries wolf: at most as often as it says."""

import json

import numpy as np
import pytest

from isotune.data.contents import content_digest, normalised, random_labels
from isotune.evaluation.classification.chance_test import accuracy_against_chance


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
