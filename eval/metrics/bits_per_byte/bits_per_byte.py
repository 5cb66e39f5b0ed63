"""Bits that a byte of some texts costs when they are coded with a model: comparable between tokenizers.

evaluate.load("eval/metrics/bits_per_byte").compute(predictions=NATS, references=TEXTS)

A prediction is a text's negative log-likelihood in nats, summed over its tokens; a reference is the text.
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules_text import TEXT, likelihood_info, of_likelihoods


class BitsPerByte(evaluate.Metric):
    """`bits_per_byte` as eval/generate.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return likelihood_info(__doc__, TEXT)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        found = of_likelihoods(predictions, [1] * len(references), [len(text.encode()) for text in references])
        return {"bits_per_byte": found["bits_per_byte"]}
