"""The local `evaluate` modules load without a network and give what scikit-learn and torchmetrics give."""

import socket

import evaluate
import numpy as np
import pytest
import torch
import torchmetrics.classification as torched
from sklearn import metrics as theirs

from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.statistics.resampling import values


@pytest.fixture
def load(repository, monkeypatch):
    """`evaluate.load` of a module of this repository, with the network cut."""

    def refuse(*args, **kwargs):
        raise OSError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return lambda name: evaluate.load(str(repository / "eval" / "metrics" / "isotune"), name)


CHANCE = np.random.default_rng(3)
LABELS = CHANCE.integers(0, 3, 80)
PROBABILITIES = CHANCE.dirichlet([1, 1, 1], 80)
CHOSEN = PROBABILITIES.argmax(axis=1)
TWO = {"predictions": CHOSEN > 0, "references": LABELS > 0}


def of_torchmetrics(metric) -> float:
    return metric(torch.from_numpy(PROBABILITIES), torch.from_numpy(LABELS)).item()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", theirs.accuracy_score(LABELS, CHOSEN)),
        ("accuracy", of_torchmetrics(torched.MulticlassAccuracy(3, average="micro"))),
        ("mean_absolute_error", theirs.mean_absolute_error(LABELS, CHOSEN)),
        ("quadratic_kappa", theirs.cohen_kappa_score(LABELS, CHOSEN, weights="quadratic")),
        ("quadratic_kappa", of_torchmetrics(torched.MulticlassCohenKappa(3, weights="quadratic"))),
    ],
)
def test_a_metric_of_classes(load, name, expected):
    found = load(name).compute(predictions=CHOSEN, references=LABELS)
    assert found == {name: pytest.approx(expected, abs=1e-6)}


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "binary"])
@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_a_mean_over_classes(load, name, average):
    given = TWO if average == "binary" else {"predictions": CHOSEN, "references": LABELS}
    expected = getattr(theirs, f"{name}_score")(given["references"], given["predictions"], average=average)
    assert load(name).compute(**given, average=average) == {name: pytest.approx(expected)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("log_loss", theirs.log_loss(LABELS, PROBABILITIES)),
        ("brier", theirs.brier_score_loss(LABELS, PROBABILITIES)),
        ("roc_auc", theirs.roc_auc_score(LABELS, PROBABILITIES, multi_class="ovr")),
        ("roc_auc", of_torchmetrics(torched.MulticlassAUROC(3))),
        ("pr_auc", theirs.average_precision_score(np.eye(3)[LABELS], PROBABILITIES)),
        ("pr_auc", of_torchmetrics(torched.MulticlassAveragePrecision(3))),
        ("expected_calibration_error", of_torchmetrics(torched.MulticlassCalibrationError(3, n_bins=15))),
    ],
)
def test_a_metric_of_probabilities(load, name, expected):
    found = load(name).compute(predictions=PROBABILITIES, references=LABELS)
    assert found == {name: pytest.approx(expected, abs=1e-6)}


def test_every_metric_of_a_classifier_has_a_module(load):
    of_harness = values(classification_statistics(LABELS, PROBABILITIES, ordinal=True))
    means = ("_macro", "_micro", "_weighted")
    names = {next((name.removesuffix(m) for m in means if name.endswith(m)), name) for name in of_harness}
    names = {name.split("_class_")[0] for name in names}
    assert names and {load(name).config_name for name in names} == names


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("f1", {"predictions": [0, 1, 2], "references": [0, 1, 1]}, "average='binary' is for two classes"),
        ("f1", {"predictions": [0], "references": [0], "average": "harmonic"}, "average is 'harmonic'"),
        ("accuracy", {"predictions": [-1], "references": [0]}, "a class is a whole number from 0"),
        ("brier", {"predictions": [[0.5, 0.5]], "references": [2]}, "a reference is a class from 0 to 1"),
        ("log_loss", {"predictions": [[float("nan"), 0.5]], "references": [1]}, "finite and sum to 1"),
    ],
)
def test_what_is_no_prediction_is_refused(load, name, given, said):
    with pytest.raises(ValueError, match=said):
        load(name).compute(**given)
