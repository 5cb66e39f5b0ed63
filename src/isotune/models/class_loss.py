"""The training loss of a classifier: cross-entropy, with the class weights and label smoothing of the recipe.

It is torch's `cross_entropy(weight=..., label_smoothing=...)`, split so that a global batch may be divided into any
microbatches on any ranks: each microbatch yields a sum over its documents, and the total is divided by the summed
weights of the global batch, which the batch schedule knows.

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
    """Weights by class (None: all 1) and the share e of each target that is spread over all classes."""

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
        """Sum of the weights of documents of these classes, int [documents]; without weights, their number."""
        if self.class_weights is None:
            return len(labels)
        # rounded as in `summed`
        weights = np.array(self.class_weights, np.float32).astype(np.float64)
        return float(np.bincount(labels, minlength=len(weights)) @ weights)


def choose_weights(
    class_weights: str | Sequence[float] | None, labels: np.ndarray, classes: int
) -> tuple[float, ...] | None:
    """Weights by class.

    `balanced` is scikit-learn's: documents / (classes * documents of the class), so that every class has the same sum.

    Args:
        class_weights: of the recipe: `balanced`, one weight per class, or None.
        labels: int [documents], of the training data.
        classes: number of classes.

    Raises:
        UserError: the number of weights is not that of the classes.
    """
    if class_weights is None:
        return None
    if class_weights == "balanced":
        counts = np.bincount(labels, minlength=classes)
        return tuple((len(labels) / (classes * counts)).tolist())
    if len(class_weights) != classes:
        raise UserError(
            f"class_weights has {len(class_weights)} numbers, and the data has {classes} classes: give one for each"
        )
    return tuple(float(weight) for weight in class_weights)
