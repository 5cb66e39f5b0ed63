"""The interface between an optimizer update and what is learned."""

from typing import Any, Protocol

import torch

from isotune.data.batch_schedule import Step
from isotune.training.evaluation import EvaluationRun


class Task(Protocol):
    """Instruction tuning or classification.

    A microbatch's forward returns the loss as a sum over its targets; the update divides by `denominator`.

    Attributes:
        attention: what the model must attend by when training begins.
        item: what the rows of the schedule are called in messages.
        target: what the targets of the loss are called in metrics.jsonl.
    """

    attention: str
    item: str
    target: str

    def denominator(self, step: Step) -> float:
        """What the summed loss of the global batch is divided by."""
        ...

    def count(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """A whole number of one microbatch, int64 [], to be added up over the global batch; None is zero."""
        ...

    def train_metrics(self, step: Step, count: int) -> dict[str, float]:
        """What the step's line has beside its loss, from the added counts."""
        ...

    def evaluate(self, run: EvaluationRun) -> dict[str, float]:
        """The metrics of the evaluation documents, named eval_*; every rank calls it."""
        ...
