"""BLEU of all texts together, 0 to 100, as sacrebleu computes it.

evaluate.load("eval/metrics/bleu").compute(predictions=[...], references=[...])
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules_text import of_texts, text_info


class Bleu(evaluate.Metric):
    """`bleu` as eval/generate.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return text_info(__doc__)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        return of_texts(predictions, references, "bleu")
