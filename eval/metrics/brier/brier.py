"""The squared distance of the probabilities from the truth, halved for two classes.

evaluate.load("eval/metrics/brier").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import of_probabilities, probability_info


class Brier(evaluate.Metric):
    """`brier` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return probability_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return {"brier": of_probabilities(predictions, references)["brier"]}
