"""The area under the ROC curve: of class 1 of two classes, else the mean of each against the others.

evaluate.load("eval/metrics/roc_auc").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import of_probabilities, probability_info


class RocAuc(evaluate.Metric):
    """`roc_auc` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return probability_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return {"roc_auc": of_probabilities(predictions, references)["roc_auc"]}
