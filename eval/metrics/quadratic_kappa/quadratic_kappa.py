"""Agreement beyond chance where classes have an order: Cohen's kappa with squared distances.

evaluate.load("eval/metrics/quadratic_kappa").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import label_info, of_order


class QuadraticKappa(evaluate.Metric):
    """`quadratic_kappa` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return label_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return {"quadratic_kappa": of_order(predictions, references)["quadratic_kappa"]}
