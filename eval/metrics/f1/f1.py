"""The harmonic mean of precision and recall.

average: binary (class 1 of two classes), macro, micro or weighted.

evaluate.load("eval/metrics/f1").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import averaged, label_info


class F1(evaluate.Metric):
    """`f1` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return label_info(__doc__)

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:  # type: ignore[override]
        return averaged("f1", predictions, references, average)
