"""Of the rows that were taken for a class, the share that is of it.

average: binary (class 1 of two classes), macro, micro or weighted.

evaluate.load("eval/metrics/precision").compute(predictions=..., references=...)
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules import averaged, label_info


class Precision(evaluate.Metric):
    """`precision` as eval/classify.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return label_info(__doc__)

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:  # type: ignore[override]
        return averaged("precision", predictions, references, average)
