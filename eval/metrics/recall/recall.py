"""Of the rows of a class, the share that was taken for it.

average: binary (class 1 of two classes), macro, micro or weighted.

evaluate.load("eval/metrics/recall").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import averaged, label_info


class Recall(evaluate.Metric):
    """`recall` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return label_info(__doc__)

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:  # type: ignore[override]
        return averaged("recall", predictions, references, average)
