"""The loss of a classifier in training: cross-entropy, with class weights and label smoothing where the recipe says so.

It is torch's own `cross_entropy(weight=..., label_smoothing=...)`, cut in two so that a global batch may be spread over
any number of passes and ranks: each pass gives a sum over its documents, and the sum of all passes is divided by the
summed weights of the whole global batch, which the plan knows.

    loss of a step = sum over its documents of [(1 - e) w(y) (-log p(y)) + e/K sum over classes c of w(c) (-log p(c))]
                     ---------------------------------------------------------------------------------------------
                                            sum over its documents of w(y)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from isotune.io.errors import UserError


@dataclass(frozen=True)
class ClassLoss:
    """Weights by class (None: all alike) and the share e of each target that is spread over all classes."""

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum over documents, in fp32: logits [documents, classes], targets int64 [documents]."""
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, dtype=torch.float32, device=logits.device)
        smoothing = self.label_smoothing
        return functional.cross_entropy(logits.float(), targets, weights, reduction="sum", label_smoothing=smoothing)

    def denominator(self, labels: np.ndarray) -> float:
        """The summed weights of documents of these classes, int [documents]; without weights, how many they are."""
        if self.class_weights is None:
            return len(labels)
        # the weights as they are in the sum above
        weights = np.array(self.class_weights, np.float32).astype(np.float64)
        return float(np.bincount(labels, minlength=len(weights)) @ weights)


def choose_weights(said: str | Sequence[float] | None, labels: np.ndarray, classes: int) -> tuple[float, ...] | None:
    """The weights that `class_weights` of a recipe means for training documents of these labels, int [documents].

    `balanced` is scikit-learn's: documents / (classes * documents of the class), so every class weighs the same in all.

    Raises:
        UserError: a number for each class is not what was said.
    """
    if said is None:
        return None
    if said == "balanced":
        counts = np.bincount(labels, minlength=classes)
        return tuple((len(labels) / (classes * counts)).tolist())
    if len(said) != classes:
        raise UserError(f"class_weights has {len(said)} numbers, and the data has {classes} classes: say one for each")
    return tuple(float(weight) for weight in said)
