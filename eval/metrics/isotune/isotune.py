"""The built-in metrics of eval/classify.py and eval/generate.py as one `evaluate` module, which needs no network.

evaluate.load("eval/metrics/isotune", "accuracy").compute(predictions=[0, 1, 1], references=[0, 1, 0])
evaluate.load("eval/metrics/isotune", "f1").compute(predictions=..., references=..., average="macro")
evaluate.load("eval/metrics/isotune", "log_loss").compute(predictions=[[0.2, 0.8]], references=[1])
evaluate.load("eval/metrics/isotune", "rouge").compute(predictions=["a cat"], references=["the cat"])

The configuration names the metric:

    accuracy, mean_absolute_error, quadratic_kappa      predictions and references are classes, integers from 0
    precision, recall, f1                               so they are; average: binary (class 1 of two), macro, micro,
                                                        weighted
    log_loss, brier, expected_calibration_error,        a prediction is the list of the probabilities of all classes
    roc_auc, pr_auc
    exact_match, rouge, bleu, chrf                      predictions and references are texts
    perplexity, bits_per_byte                           a prediction is the negative log-likelihood of a text in nats,
                                                        a reference its number of tokens, or the text itself
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from isotune.evaluation.metrics.classification import (
    AVERAGES,
    KINDS,
    class_suffixes,
    label_statistics,
    ordinal_statistics,
    probability_statistics,
)
from isotune.evaluation.metrics.text import ROUGE, Likelihood, measure_likelihoods, measure_texts
from isotune.evaluation.statistics.resampling import values

CLASS, NATS, TEXT = datasets.Value("int64"), datasets.Value("float64"), datasets.Value("string")
PROBABILITIES = datasets.Sequence(datasets.Value("float64"))
FEATURES: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("accuracy", *KINDS, "mean_absolute_error", "quadratic_kappa"), (CLASS, CLASS)),
    **dict.fromkeys(("log_loss", "brier", "expected_calibration_error", "roc_auc", "pr_auc"), (PROBABILITIES, CLASS)),
    **dict.fromkeys(("exact_match", "rouge", "bleu", "chrf"), (TEXT, TEXT)),
    "perplexity": (NATS, datasets.Value("int64")),
    "bits_per_byte": (NATS, TEXT),
}


class Isotune(evaluate.Metric):
    """The metric that the configuration names, as the evaluation scripts compute it; NaN where it is undefined."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in FEATURES:
            raise ValueError(f"the configuration is {self.config_name!r}: it may be {', '.join(FEATURES)}")
        predictions, references = FEATURES[self.config_name]
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions and references, one a row",
            features=datasets.Features({"predictions": predictions, "references": references}),
        )

    def _compute(self, predictions: Any, references: Any, average: str | None = None) -> dict[str, float]:  # type: ignore[override]  (the columns are this metric's)
        name = str(self.config_name)
        if average is not None and name not in KINDS:
            raise ValueError(f"{name} is no mean over classes: it takes no average")
        prediction, _ = FEATURES[name]
        if name in KINDS:
            return {name: averaged(name, predictions, references, average or "binary")}
        if name == "rouge":
            metrics = text_metrics(predictions, references)
            return {kind: metrics[kind] for kind in ROUGE}
        if prediction is CLASS:
            return {name: class_metrics(predictions, references)[name]}
        if prediction is PROBABILITIES:
            return {name: probability_metrics(predictions, references)[name]}
        if prediction is TEXT:
            return {name: text_metrics(predictions, references)[name]}
        return {name: likelihood_metrics(predictions, references)[name]}


def class_metrics(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Every metric of predicted classes by name.

    Raises:
        ValueError: a class is below 0.
    """
    chosen, labels = np.asarray(predictions, np.int64), np.asarray(references, np.int64)
    if min(chosen.min(), labels.min()) < 0:
        raise ValueError("a class is a whole number from 0")
    classes = int(max(chosen.max(), labels.max())) + 1
    return values([*label_statistics(labels, chosen, class_suffixes(classes)), *ordinal_statistics(labels, chosen)])


def averaged(kind: str, predictions: Sequence[int], references: Sequence[int], average: str) -> float:
    """Precision, recall or F1 in one mean over classes, or of class 1 alone.

    Raises:
        ValueError: `average` is unknown, or binary and there are more than two classes.
    """
    metrics = class_metrics(predictions, references)
    if average in AVERAGES:
        return metrics[f"{kind}_{average}"]
    if average != "binary":
        raise ValueError(f"average is {average!r}: it may be binary, {', '.join(AVERAGES)}")
    if f"{kind}_class_2" in metrics:
        raise ValueError(f"average='binary' is for two classes: use {', '.join(AVERAGES)}")
    return float(np.nan_to_num(metrics.get(f"{kind}_class_1", 0.0)))  # without class 1 it is 0, as in scikit-learn


def probability_metrics(predictions: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
    """Every metric of probabilities by name.

    Raises:
        ValueError: fewer than two classes, numbers that are no probabilities, or a reference that is no class.
    """
    probabilities, labels = np.asarray(predictions, np.float64), np.asarray(references, np.int64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError("a prediction is a list of probabilities, one for each of two classes or more")
    if not (np.isfinite(probabilities).all() and np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)):
        raise ValueError("the probabilities of a row are finite and sum to 1")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"a reference is a class from 0 to {probabilities.shape[1] - 1}")
    return values(probability_statistics(labels, probabilities, class_suffixes(probabilities.shape[1])))


def text_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Every metric of texts by name."""
    metrics = measure_texts(predictions, references, [True] * len(predictions))
    return values([metric.of_all for metric in metrics.values()])


def likelihood_metrics(nats: Sequence[float], references: Sequence[int] | Sequence[str]) -> dict[str, float]:
    """perplexity of numbers of tokens, or bits_per_byte of texts.

    Raises:
        ValueError: a text has no token or no byte.
    """
    counts = [len(one.encode()) if isinstance(one, str) else int(one) for one in references]
    if min(counts, default=1) < 1:
        raise ValueError("a text has at least one token and one byte")
    likelihoods = [Likelihood(nll, count, count) for nll, count in zip(nats, counts, strict=True)]
    return values([metric.of_all for metric in measure_likelihoods(likelihoods).values()])
