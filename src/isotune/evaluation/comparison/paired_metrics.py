"""The metrics of a result as statistics over its rows, computed from its predictions, for paired tests."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.metrics.text import Likelihood, measure_likelihoods, measure_texts
from isotune.evaluation.results import CLASSIFICATION, GENERATION, PREDICTIONS, Result
from isotune.evaluation.statistics.resampling import Statistic
from isotune.io.errors import UserError

# The default metrics of a comparison: few, because every further test weakens all others.
DEFAULT_METRICS = {
    CLASSIFICATION: ("accuracy", "f1_macro", "log_loss", "brier"),
    GENERATION: ("exact_match", "rougeL", "chrf", "bits_per_byte"),
}
LOWER_IS_BETTER = frozenset(
    {"log_loss", "brier", "expected_calibration_error", "mean_absolute_error"}
    | {"nll", "perplexity", "bits_per_byte", "repetition", "empty"}
)
WITHOUT_DIRECTION = frozenset({"length_ratio", "ended"})


def statistics_of(result: Result) -> dict[str, Statistic]:
    """Every built-in metric of the predictions by name; names of one statistic share it.

    Raises:
        UserError: the predictions lack a key of their kind of evaluation.
    """
    kinds: dict[Any, Callable[[Result], list[Statistic]]] = {
        CLASSIFICATION: _classification_statistics,
        GENERATION: _text_statistics,
    }
    kind = result.facts["kind"]
    if kind not in kinds:
        raise UserError(f"{result.folder}: a result of the kind {kind!r} cannot be compared")
    return {name: statistic for statistic in kinds[kind](result) for name in statistic.names}


def check_classes(results: Sequence[Result]) -> None:
    """Refuse classifiers of different classes.

    Raises:
        UserError: the probabilities of two results are of different numbers of classes.
    """
    if results[0].facts["kind"] != CLASSIFICATION:
        return
    first, *others = [(result.folder, _labels_and_probabilities(result)[1].shape[1]) for result in results]
    for folder, classes in others:
        if classes != first[1]:
            raise UserError(f"{first[0]} and {folder} cannot be compared: {first[1]} and {classes} classes")


def correct_rows(result: Result) -> tuple[str, np.ndarray]:
    """The name of the metric that is the share of correct rows, and which rows are correct, bool [rows]."""
    if result.facts["kind"] == CLASSIFICATION:
        labels, probabilities = _labels_and_probabilities(result)
        return "accuracy", probabilities.argmax(axis=1) == labels
    return "exact_match", np.array([row["text"] == row["reference"].strip() for row in result.predictions])


def row_scores(result: Result) -> np.ndarray:
    """The score of each row, higher is better: the probability of its class, or chrF of its text; [rows]."""
    if result.facts["kind"] == CLASSIFICATION:
        labels, probabilities = _labels_and_probabilities(result)
        return probabilities[np.arange(len(labels)), labels]
    return np.array([row.get("chrf", row.get("exact_match", 0.0)) for row in result.predictions], np.float64)


def _classification_statistics(result: Result) -> list[Statistic]:
    labels, probabilities = _labels_and_probabilities(result)
    ordinal = "quadratic_kappa" in result.metrics or "mean_absolute_error" in result.metrics
    return classification_statistics(labels, probabilities, ordinal=ordinal)


def _labels_and_probabilities(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """int64 [rows] and float64 [rows, classes]."""
    rows = result.predictions
    where = result.folder / PREDICTIONS
    try:
        probabilities = np.array([row["probabilities"] for row in rows], np.float64)
        labels = np.array([row["label"] for row in rows])
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{where}: a row has no label, or not as many probabilities as others") from None
    classes = probabilities.shape[1] if probabilities.ndim == 2 else 0
    if labels.dtype.kind != "i" or not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{where}: a label is not a class among those with a probability")
    return labels, probabilities


def _text_statistics(result: Result) -> list[Statistic]:
    rows = result.predictions
    try:
        texts, references = [row["text"] for row in rows], [row["reference"] for row in rows]
    except KeyError as missing:
        raise UserError(f"{result.folder / PREDICTIONS}: a row has no {missing}") from None
    measured = measure_texts(texts, references, [row.get("ended", 0.0) for row in rows])
    likelihoods = [likelihood for row in rows if (likelihood := _likelihood(row)) is not None]
    if len(likelihoods) == len(rows):
        measured |= measure_likelihoods(likelihoods)
    return [metric.of_all for metric in measured.values()]


def _likelihood(row: dict[str, Any]) -> Likelihood | None:
    """The likelihood of a row's reference; None where the row has none."""
    try:
        nll, perplexity, bits = row["nll"], row["perplexity"], row["bits_per_byte"]
        return Likelihood(nll, round(nll / math.log(perplexity)), round(nll / (bits * math.log(2))))
    except (KeyError, ValueError, ZeroDivisionError):
        return None
