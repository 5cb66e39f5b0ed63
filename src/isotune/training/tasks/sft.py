"""Instruction tuning: the cross-entropy of the answers' tokens."""

import math
import time
from typing import Any

from isotune.data.batch_schedule import Step
from isotune.distributed.collectives import gather_by_number, ordered_sum
from isotune.training.evaluation import EvaluationRun


class SftTask:
    """Loss summed over supervised tokens and divided by their number in the global batch."""

    attention = "packed"
    item, target = "rows", "supervised_tokens"

    def denominator(self, step: Step) -> float:
        """Supervised tokens of the global batch, over all ranks."""
        return step.supervised_tokens

    def count(self, outputs: Any, inputs: dict[str, Any]) -> None:
        """Nothing is counted."""

    def train_metrics(self, step: Step, count: int) -> dict[str, float]:
        """None beside the loss."""
        return {}

    def evaluate(self, run: EvaluationRun) -> dict[str, float]:
        """One exact number, not a mean of batches' means, whatever the microbatches and the number of ranks.

        Returns:
            eval_loss in nats per supervised token, eval_perplexity, eval_supervised_tokens, eval_seconds.
        """
        started, step = time.perf_counter(), run.loader.step
        losses = {microbatch.number: outputs.loss for microbatch, outputs in run.outputs() if microbatch.weight}
        loss = ordered_sum(gather_by_number(losses, len(step.microbatches), run.device)) / step.supervised_tokens
        return {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_supervised_tokens": step.supervised_tokens,
            "eval_seconds": time.perf_counter() - started,
        }
