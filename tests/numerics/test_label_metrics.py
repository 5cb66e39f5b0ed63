"""The metrics of numbers and of several labels beside scikit-learn's and scipy's, on the rows and on every resample."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics

from isotune.data.classification.predictions import prediction_lines
from isotune.evaluation.classification.label_plots import draw_labels, draw_numbers
from isotune.evaluation.comparison import compare_runs
from isotune.evaluation.metrics.multi_label import multi_label_statistics
from isotune.evaluation.metrics.of_type import statistics_of
from isotune.evaluation.metrics.regression import regression_statistics
from isotune.evaluation.results import write_result
from isotune.evaluation.statistics.resampling import bootstrap_draws, draw_weights, score, values
from isotune.io.errors import UserError
from isotune.report.formatting import comparison_text
from isotune.training.label_kinds import KINDS

NUMBERS = st.lists(st.tuples(st.integers(-8, 8), st.integers(-8, 8)), min_size=3, max_size=30)


def of_numbers(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    found = {"mean_squared_error": metrics.mean_squared_error(y, p),
             "mean_absolute_error": metrics.mean_absolute_error(y, p)}  # fmt: skip
    if np.ptp(y) > 0:
        found["r2"] = metrics.r2_score(y, p)
        if np.ptp(p) > 0:
            found |= {"pearson": pearsonr(y, p).statistic, "spearman": spearmanr(y, p).statistic}
    return found


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.sampled_from([1.0, 0.125]), st.sampled_from([0.0, 1e4]))
def test_numbers_are_measured_as_elsewhere(rows, scale, shift):
    y, p = (np.array(side, np.float64) * scale + shift for side in zip(*rows, strict=True))
    found = {name: value for name, value in values(regression_statistics(y, p)).items() if np.isfinite(value)}
    assert found == pytest.approx(of_numbers(y, p), rel=1e-6, abs=1e-9)
    of_training = KINDS["regression"].metrics(y, p)
    assert {name: of_training[name] for name in found if name in of_training} == pytest.approx(
        {name: value for name, value in found.items() if name in of_training}, rel=1e-6, abs=1e-9
    )


def test_every_resample_is_the_metric_of_its_repeated_rows():
    draw = np.random.default_rng(3)
    y = draw.integers(0, 6, 40) / 2 + 1000
    p = y + draw.normal(size=40).round(1)
    labels, probabilities = draw.integers(0, 2, (40, 3)), draw.random((40, 3))
    draws = bootstrap_draws([*regression_statistics(y, p), *multi_label_statistics(labels, probabilities)], 40, 30, 5)
    weights = np.concatenate(list(draw_weights(40, 30, 5)))
    for number, counts in enumerate(weights):
        rows = np.repeat(np.arange(40), counts)
        expected = of_numbers(y[rows], p[rows]) | of_labels(labels[rows], probabilities[rows])
        for name, value in expected.items():
            assert draws[name][number] == pytest.approx(value, rel=2e-4, abs=1e-6), name


def of_labels(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    chosen = (probabilities >= 0.5).astype(int)
    scores = {"precision": metrics.precision_score, "recall": metrics.recall_score, "f1": metrics.f1_score}
    found = {f"{kind}_{average}": function(labels, chosen, average=average, zero_division=0)
             for kind, function in scores.items() for average in ("micro", "macro")}  # fmt: skip
    for k in range(labels.shape[1]):
        own = {f"{kind}_class_{k}": function(labels[:, k], chosen[:, k], zero_division=np.nan)
               for kind, function in scores.items()}  # fmt: skip
        found |= {name: value for name, value in own.items() if np.isfinite(value)}
    found["exact_match"] = metrics.accuracy_score(labels, chosen)
    found["hamming_loss"] = metrics.hamming_loss(labels, chosen)
    found["log_loss"] = np.mean([metrics.log_loss(labels[:, k], probabilities[:, k], labels=[0, 1])
                                 for k in range(labels.shape[1])])  # fmt: skip
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 25), st.integers(2, 4), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
def test_several_labels_are_measured_as_elsewhere(rows, count, seed, share):
    draw = np.random.default_rng(seed)
    labels, probabilities = (draw.random((rows, count)) < share).astype(int), draw.random((rows, count))
    found = values(multi_label_statistics(labels, probabilities))
    assert {n: v for n, v in found.items() if np.isfinite(v)} == pytest.approx(
        of_labels(labels, probabilities), abs=1e-9
    )
    of_training = KINDS["multi_label"].metrics(labels, probabilities)
    assert of_training == pytest.approx({name: found[name] for name in of_training}, abs=1e-12)


def test_where_nothing_is_told_apart_the_score_is_undefined_and_0_in_training():
    y, same = np.array([1.0, 2.0, 4.0]), np.full(3, 0.1)
    found = score(regression_statistics(y, same), 3, resamples=50)
    assert found.undefined == ["pearson", "spearman"] and found.metrics["r2"] < 0
    assert KINDS["regression"].metrics(y, same)["pearson"] == 0.0 == KINDS["regression"].metrics(same, y)["spearman"]
    assert score(regression_statistics(same, y), 3, resamples=50).undefined == ["pearson", "r2", "spearman"]


def written(folder, task_type: str, labels: np.ndarray, outputs: np.ndarray, names) -> str:
    ids = list(range(len(labels)))
    facts = {"kind": "classification", "model": folder.name, "dataset_name": "d", "dataset_split": "test",
             "task_type": task_type, "label_names": names or []}  # fmt: skip
    scores = score(statistics_of(task_type, labels, outputs, names=names), len(labels), resamples=50)
    lines = prediction_lines(task_type, ids, labels, outputs, names)
    write_result(folder, facts, scores, json.loads(json.dumps(lines)), [f"text {n}" for n in ids])
    return str(folder)


def test_two_results_of_one_kind_are_compared_and_of_two_are_not(tmp_path):
    draw = np.random.default_rng(0)
    y, labels, names = draw.normal(size=60), draw.integers(0, 2, (60, 3)), ["a", "b", "c"]
    near, far = (written(tmp_path / name, "regression", y, y + size * draw.normal(size=60), None)
                 for name, size in (("near", 0.1), ("far", 3.0)))  # fmt: skip
    found = compare_runs([far, near], resamples=200)
    shown = {difference.metric: difference.better for difference in found.pairs[0].shown}
    assert shown == {"pearson": "b", "spearman": "b", "mean_squared_error": "b"}
    lines = comparison_text(found)
    assert "rows right" not in lines and "pearson" in lines
    noise = draw.random((60, 3))
    good = written(tmp_path / "good", "multi_label", labels, 0.2 + 0.6 * labels, names)
    poor = written(tmp_path / "poor", "multi_label", labels[:, ::-1], noise[:, ::-1], names[::-1])
    found = compare_runs([good, poor], resamples=200)
    exact = next(one for one in found.pairs[0].differences if one.metric == "exact_match")
    assert exact.a == 1.0 and exact.b == ((noise >= 0.5) == labels).all(axis=1).mean() and exact.better == "a"
    assert "exact_match: 0 rows right" in comparison_text(found)
    with pytest.raises(UserError, match="one is of regression, the other of multi_label"):
        compare_runs([near, good], resamples=200)


def test_plots_say_in_words_what_they_show(tmp_path):
    y = np.arange(20.0)
    draw_numbers(y, y * 0.5, tmp_path / "predicted.png")
    text = (tmp_path / "predicted.txt").read_text().splitlines()
    assert text[0] == "Predicted over actual numbers of 20 texts; pearson 1.000, spearman 1.000, r2 0.071."
    assert text[1] == "Actual 0 to 3.8: 4 texts, predicted 0.75, off by 0.75."
    draw_numbers(np.ones(3), np.ones(3), tmp_path / "same.png")
    assert "no correlation is defined" in (tmp_path / "same.txt").read_text()
    labels = np.array([[1, 0], [1, 0], [0, 0]])
    draw_labels(labels, np.array([[0.9, 0.1], [0.2, 0.1], [0.6, 0.2]]), ["sea", "rain"], tmp_path / "labels.png")
    text = (tmp_path / "labels.txt").read_text().splitlines()
    assert text[1] == "sea: 2 texts, predicted for 2; precision 0.500, recall 0.500, f1 0.500."
    assert text[2] == "rain: 0 texts, predicted for 0; precision undefined, recall undefined, f1 undefined."
    assert (tmp_path / "labels.png").read_bytes()[:4] == b"\x89PNG"
