"""Every classification metric is the one that scikit-learn gives, on whatever can be made up: ties, absent classes."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy
from sklearn import metrics as theirs
from torchmetrics.classification import MulticlassCalibrationError

from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.statistics.resampling import OfWeights, bootstrap_draws, score, values
from isotune.io.errors import UserError

AVERAGES = ("macro", "micro", "weighted")


@st.composite
def predictions(draw):
    """Labels and probabilities with ties, classes that nothing has, rows of one class, and certainty."""
    count, rows = draw(st.integers(2, 5)), draw(st.integers(1, 40))
    labels = draw(of_numpy.arrays(np.int64, rows, elements=st.integers(0, count - 1)))
    weights = draw(of_numpy.arrays(np.int64, (rows, count), elements=st.integers(0, 6)))
    weights[weights.sum(axis=1) == 0] = 1
    return labels, weights / weights.sum(axis=1, keepdims=True)


def of_sklearn(labels, probabilities):
    """Everything by scikit-learn, where it is defined."""
    classes = probabilities.shape[1]
    every = np.arange(classes)
    chosen = probabilities.argmax(axis=1)
    found = {"accuracy": theirs.accuracy_score(labels, chosen)}
    for average in AVERAGES:
        three = theirs.precision_recall_fscore_support(labels, chosen, average=average, zero_division=0)
        found |= {f"{kind}_{average}": value for kind, value in zip(("precision", "recall", "f1"), three, strict=False)}
    present = set(labels) | set(chosen)
    three = theirs.precision_recall_fscore_support(labels, chosen, labels=every, average=None, zero_division=np.nan)
    for kind, of_classes in zip(("precision", "recall", "f1"), three, strict=False):
        found |= {f"{kind}_class_{k}": of_classes[k] for k in every}
    found["log_loss"] = theirs.log_loss(labels, probabilities, labels=every)
    given = probabilities[:, 1] if classes == 2 else probabilities
    found["brier"] = theirs.brier_score_loss(labels, given, labels=every)
    areas = {}
    for k in every:
        if 0 < (labels == k).sum() < len(labels):
            areas[f"roc_auc_class_{k}"] = theirs.roc_auc_score(labels == k, probabilities[:, k])
            areas[f"pr_auc_class_{k}"] = theirs.average_precision_score(labels == k, probabilities[:, k])
    for kind in ("roc_auc", "pr_auc"):
        known = [value for name, value in areas.items() if name.startswith(kind)]
        if known:
            found[kind] = areas[f"{kind}_class_1"] if classes == 2 else np.mean(known)
    found |= areas if classes > 2 else {}
    found["mean_absolute_error"] = theirs.mean_absolute_error(labels, chosen)
    if len(present) > 1:
        found["quadratic_kappa"] = theirs.cohen_kappa_score(labels, chosen, labels=every, weights="quadratic")
    return found


@settings(max_examples=75, deadline=None)
@given(predictions())
def test_every_metric_is_scikit_learns_and_one_that_cannot_be_has_no_value(made):
    labels, probabilities = made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = of_sklearn(labels, probabilities)
    found = values(classification_statistics(labels, probabilities, ordinal=True))
    known = {name: value for name, value in found.items() if np.isfinite(value)}
    assert known.pop("expected_calibration_error") == pytest.approx(
        calibration_by_hand(labels, probabilities), abs=1e-12
    )
    assert known == pytest.approx({n: v for n, v in expected.items() if np.isfinite(v)}, rel=1e-6, abs=1e-9)


def test_the_precision_of_a_class_that_is_never_predicted_is_undefined_and_0_in_the_mean():
    labels, sure = np.array([0, 0, 1, 2]), np.array([[0.8, 0.1, 0.1]] * 3 + [[0.1, 0.8, 0.1]])
    found = score(classification_statistics(labels, sure, names=["a", "b", "c"]), 4, resamples=100)
    assert found.undefined == ["precision[c]"] and "precision[c]" not in found.intervals
    assert found.metrics["recall[c]"] == found.metrics["f1[c]"] == 0
    assert found.metrics["precision_macro"] == pytest.approx((2 / 3 + 0 + 0) / 3)


def calibration_by_hand(labels, probabilities):
    total = 0.0
    for low in range(15):
        rows = [
            (max(row), int(np.argmax(row)) == label)
            for row, label in zip(probabilities.tolist(), labels, strict=True)
            if low < 15 * max(row) <= low + 1
        ]
        total += abs(sum(sure for sure, _ in rows) - sum(right for _, right in rows))
    return total / len(labels)


def test_the_calibration_error_is_torchmetrics():
    generator = np.random.default_rng(2)
    probabilities = generator.dirichlet([0.5, 0.7, 0.4], size=500)
    labels = generator.integers(0, 3, 500)
    metric = MulticlassCalibrationError(num_classes=3, n_bins=15, norm="l1")
    expected = metric(torch.from_numpy(probabilities), torch.from_numpy(labels)).item()
    found = values(classification_statistics(labels, probabilities))["expected_calibration_error"]
    assert found == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(predictions())
def test_a_resample_is_scored_as_if_its_rows_had_been_repeated(made):
    labels, probabilities = made
    statistics = classification_statistics(labels, probabilities, ordinal=True)
    names = tuple(name for one in statistics for name in one.names)

    def of_repeated(weights):
        drawn = [np.repeat(np.arange(len(labels)), one) for one in weights]
        scored = [values(classification_statistics(labels[rows], probabilities[rows], ordinal=True)) for rows in drawn]
        return np.array([[one[name] for name in names] for one in scored])

    expected = OfWeights(tuple(f"repeated {name}" for name in names), len(labels), of_repeated)
    draws = bootstrap_draws([*statistics, expected], len(labels), resamples=4, seed=1)
    for name in names:
        np.testing.assert_allclose(draws[name], draws[f"repeated {name}"], rtol=1e-5, atol=1e-6, err_msg=name)


def test_only_the_metrics_that_a_task_names_are_given_and_a_wrong_name_is_refused():
    labels, probabilities = np.array([0, 1, 2, 2]), np.eye(3)[[0, 1, 1, 2]]
    statistics = classification_statistics(labels, probabilities)
    found = score(statistics, 4, only=["accuracy", "f1"], resamples=50)
    assert set(found.metrics) == {"accuracy", "f1_class_0", "f1_class_1", "f1_class_2"} == set(found.intervals)
    with pytest.raises(UserError, match=r"metrics: there is no 'f2' here; there are accuracy, brier"):
        score(statistics, 4, only=["f2"])


def test_every_value_lies_in_its_interval_and_what_cannot_be_is_named():
    generator = np.random.default_rng(5)
    labels = np.zeros(60, int)
    found = score(classification_statistics(labels, generator.dirichlet([9, 9], 60), ordinal=True), 60)
    assert found.undefined == ["pr_auc", "recall_class_1", "roc_auc"]
    assert all(low <= found.metrics[name] <= high for name, (low, high) in found.intervals.items())
    assert found.intervals.keys() == found.metrics.keys()
