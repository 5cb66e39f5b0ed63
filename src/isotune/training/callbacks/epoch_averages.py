"""Loss and accuracy of training between two evaluations, so that a line compares the two: per epoch, by default.

Nothing is kept for a run that goes on: the sums are made from the steps' own lines, which its checkpoint holds.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


class EpochAverages:
    """Exact means over the documents of the steps since the last evaluation.

    Args:
        lines: metrics.jsonl so far, where the run goes on.
    """

    def __init__(self, lines: str = "") -> None:
        self._steps: list[tuple[int, float, int]] = []
        for line in map(json.loads, lines.splitlines()):
            if "eval_loss" in line:
                self._steps.clear()
            elif "loss" in line:
                self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """A step's line of metrics.jsonl: its documents, loss and accuracy."""
        loss = math.nan if line["loss"] is None else line["loss"]
        # a whole number again: the accuracy is its correctly rounded quotient
        self._steps.append((line["documents"], loss, round(line["accuracy"] * line["documents"])))

    def take(self) -> dict[str, float]:
        """train_loss, train_accuracy of the steps since the last call; nothing where there are none.

        A step without a finite loss counts in neither.
        """
        steps = [step for step in self._steps if math.isfinite(step[1])]
        self._steps.clear()
        if not steps:
            return {}
        documents = sum(count for count, _, _ in steps)
        return {
            "train_loss": math.fsum(count * loss for count, loss, _ in steps) / documents,
            "train_accuracy": sum(correct for _, _, correct in steps) / documents,
        }
