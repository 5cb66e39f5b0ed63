"""What the local `evaluate` modules of eval/metrics share, so that each is its name and one call of the harness's code.

`evaluate.load("eval/metrics/NAME")` then needs no network, where `evaluate.load("NAME")` fetches a script.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from isotune.evaluation.metrics.labels import label_statistics, ordinal_statistics
from isotune.evaluation.metrics.probabilities import probability_statistics
from isotune.evaluation.statistics.resampling import Statistic, values

CLASS = datasets.Value("int64")
PROBABILITIES = datasets.Sequence(datasets.Value("float64"))


def label_info(description: str | None) -> evaluate.MetricInfo:
    """Of a metric of classes: predictions and references are whole numbers from 0."""
    return _info(description, CLASS)


def probability_info(description: str | None) -> evaluate.MetricInfo:
    """Of a metric of probabilities: a prediction is a list with one for each class, a reference a whole number."""
    return _info(description, PROBABILITIES)


def of_labels(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Every metric of `metrics_labels.label_statistics` by name."""
    chosen, labels = _classes(predictions, references)
    return values(label_statistics(labels, chosen, int(max(chosen.max(), labels.max())) + 1))


def averaged(kind: str, predictions: Sequence[int], references: Sequence[int], average: str) -> dict[str, float]:
    """`kind` in one kind of mean over classes, or of class 1 alone.

    Raises:
        ValueError: `average` is none of binary, macro, micro, weighted, or binary and there are more than two classes.
    """
    found = of_labels([*predictions], [*references])
    name = f"{kind}_{average}"
    if average == "binary":
        if f"{kind}_class_2" in found:
            raise ValueError("average='binary' is for two classes: say macro, micro or weighted")
        name = f"{kind}_class_1"
        found = {name: 0.0, **{n: v for n, v in found.items() if v == v}}  # nothing of class 1 anywhere: 0
    if name not in found:
        raise ValueError(f"average is {average!r}: it may be binary, macro, micro or weighted")
    return {kind: found[name]}


def of_order(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Every metric of `metrics_labels.ordinal_statistics` by name; NaN where it does not exist."""
    chosen, labels = _classes(predictions, references)
    return values(ordinal_statistics(labels, chosen))


def of_probabilities(predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
    """Every metric of `metrics_probabilities.probability_statistics` by name; NaN where it does not exist.

    Raises:
        ValueError: fewer than two classes, a probability that is none, or a reference that is no class.
    """
    probabilities, labels = np.asarray(predictions, np.float64), np.asarray(references, np.int64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError("a prediction is a list of probabilities, one for each of two classes or more")
    if not (np.isfinite(probabilities).all() and np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)):
        raise ValueError("the probabilities of a row are finite and sum to 1")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"a reference is a class from 0 to {probabilities.shape[1] - 1}")
    statistics: list[Statistic] = probability_statistics(labels, probabilities)
    return values(statistics)


def _classes(predictions: Sequence[int], references: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    chosen, labels = np.asarray(predictions, np.int64), np.asarray(references, np.int64)
    if min(chosen.min(), labels.min()) < 0:
        raise ValueError("a class is a whole number from 0")
    return chosen, labels


def _info(description: str | None, prediction: Any) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description or "",
        citation="",
        inputs_description="predictions and references, one a row",
        features=datasets.Features({"predictions": prediction, "references": CLASS}),
    )
