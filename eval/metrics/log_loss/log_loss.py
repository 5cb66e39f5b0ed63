"""The mean surprise of what was true, in nats.

evaluate.load("eval/metrics/log_loss").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import of_probabilities, probability_info


class LogLoss(evaluate.Metric):
    """`log_loss` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return probability_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return {"log_loss": of_probabilities(predictions, references)["log_loss"]}
