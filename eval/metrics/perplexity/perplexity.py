"""Perplexity a token of texts, from how likely a model finds each: exp of all their nats over all their tokens.

evaluate.load("eval/metrics/perplexity").compute(predictions=NATS, references=TOKENS)

A prediction is a text's negative log-likelihood in nats, summed over its tokens; a reference is how many those are.
"""

from typing import Any

import evaluate

from isotune.evaluation.metrics.modules_text import TOKENS, likelihood_info, of_likelihoods


class Perplexity(evaluate.Metric):
    """`perplexity` as eval/generate.py computes it."""

    def _info(self) -> evaluate.MetricInfo:
        return likelihood_info(__doc__, TOKENS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        found = of_likelihoods(predictions, references, [1] * len(references))
        return {"perplexity": found["perplexity"]}
