"""How many classes a prediction is off, where classes have an order.

evaluate.load("eval/metrics/mean_absolute_error").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import label_info, of_order


class MeanAbsoluteError(evaluate.Metric):
    """`mean_absolute_error` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return label_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return {"mean_absolute_error": of_order(predictions, references)["mean_absolute_error"]}
