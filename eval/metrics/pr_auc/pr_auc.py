"""Average precision: of class 1 of two classes, else the mean of each against the others.

evaluate.load("eval/metrics/pr_auc").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import of_probabilities, probability_info


class PrAuc(evaluate.Metric):
    """`pr_auc` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return probability_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return {"pr_auc": of_probabilities(predictions, references)["pr_auc"]}
