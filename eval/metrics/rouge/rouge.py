"""ROUGE-1, ROUGE-2 and ROUGE-L (F1, 0 to 1), the mean over texts, as rouge-score computes them.

evaluate.load("eval/metrics/rouge").compute(predictions=[...], references=[...])
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules_text import of_texts, text_info
from isotune.evaluation.metrics.text import ROUGE


class Rouge(evaluate.Metric):
    """`rouge1`, `rouge2` and `rougeL` as eval/generate.py computes them."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return of_texts(predictions, references, *ROUGE)
