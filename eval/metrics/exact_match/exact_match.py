"""The share of texts that are their reference, letter for letter.

evaluate.load("eval/metrics/exact_match").compute(predictions=[...], references=[...])
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules_text import of_texts, text_info


class ExactMatch(evaluate.Metric):
    """`exact_match` as eval/generate.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return of_texts(predictions, references, "exact_match")
