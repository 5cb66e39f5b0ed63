"""The share of predictions that are right.

evaluate.load("eval/metrics/accuracy").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import label_info, of_labels


class Accuracy(evaluate.Metric):
    """`accuracy` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return label_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return {"accuracy": of_labels(predictions, references)["accuracy"]}
