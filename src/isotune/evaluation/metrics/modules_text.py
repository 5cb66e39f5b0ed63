"""What the local `evaluate` modules of texts in eval/metrics share; those of classes share `metrics_modules`."""

from collections.abc import Sequence

import datasets
import evaluate

from isotune.evaluation.generation.likelihood import Likelihood
from isotune.evaluation.metrics.text import measure_likelihoods, measure_texts
from isotune.evaluation.statistics.resampling import values

TEXT, NATS, TOKENS = datasets.Value("string"), datasets.Value("float64"), datasets.Value("int64")


def text_info(description: str | None) -> evaluate.MetricInfo:
    """Of a metric of texts: a prediction and its one reference are texts."""
    return _info(description, TEXT, TEXT)


def likelihood_info(description: str | None, reference: datasets.Value) -> evaluate.MetricInfo:
    """Of a metric of likelihood: a prediction is the negative log-likelihood of a text, in nats."""
    return _info(description, NATS, reference)


def of_texts(predictions: Sequence[str], references: Sequence[str], *names: str) -> dict[str, float]:
    """The metrics of `text_metrics.measure_texts` that are named."""
    measured = measure_texts(predictions, references, [True] * len(predictions))
    return values([measured[name].of_all for name in names])


def of_likelihoods(nats: Sequence[float], tokens: Sequence[int], byte_counts: Sequence[int]) -> dict[str, float]:
    """Every metric of `text_metrics.measure_likelihoods` by name.

    Raises:
        ValueError: a text has no token or no byte.
    """
    if min(*tokens, *byte_counts, 1) < 1:
        raise ValueError("a text has at least one token and one byte")
    found = [Likelihood(*one, True) for one in zip(nats, tokens, byte_counts, strict=True)]
    return values([metric.of_all for metric in measure_likelihoods(found).values()])


def _info(description: str | None, prediction: datasets.Value, reference: datasets.Value) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description or "",
        citation="",
        inputs_description="predictions and references, one a row",
        features=datasets.Features({"predictions": prediction, "references": reference}),
    )
