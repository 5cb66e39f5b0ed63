"""The losses of classification, each as a sum over documents and the number that a global batch's sum is divided by.

They are those of transformers, split so that a global batch may be divided into any microbatches on any ranks.

    single_label   cross-entropy / (weights of the) documents
    multi_label    (weighted) binary cross-entropy of every label, summed / (documents x labels)
    regression     squared error / documents
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.io.errors import UserError

# What transformers calls the kinds of labels in `problem_type` of a configuration.
PROBLEM_TYPES = {
    SINGLE_LABEL: "single_label_classification",
    MULTI_LABEL: "multi_label_classification",
    REGRESSION: "regression",
}


def task_type_of(config: Any) -> str:
    """What kind of labels a model is for: as its configuration says, else by the number of its outputs."""
    said = {problem_type: task_type for task_type, problem_type in PROBLEM_TYPES.items()}.get(config.problem_type)
    return said or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)


class DocumentLoss(ABC):
    """A loss that is a sum over documents."""

    class_weights: tuple[float, ...] | None = None  # by class or label

    @property
    def plain(self) -> "DocumentLoss":
        """The loss of evaluations, without weights and smoothing, so that runs compare."""
        return self

    @abstractmethod
    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum over documents, in fp32: logits [documents, outputs], targets [documents] or [documents, labels]."""

    @abstractmethod
    def denominator(self, labels: np.ndarray) -> float:
        """What the sum over documents with these labels, [documents, ...], is divided by."""


@functools.lru_cache(maxsize=8)
def constant_on(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The values on a device, float32 [values]: copied there once, and not in each microbatch."""
    with torch.inference_mode(False):  # what is kept may be part of a graph later
        return torch.tensor(values, device=device)


@dataclass(frozen=True)
class ClassLoss(DocumentLoss):
    """Cross-entropy with weights by class (None: all 1) and the share e of each target that is spread over all classes.

    It is torch's `cross_entropy(weight=..., label_smoothing=...)`: each microbatch yields a sum over its documents, and
    the total is divided by the summed weights of the global batch, which the batch schedule knows.

        loss of a step = sum over documents of [(1 - e) w(y) (-log p(y)) + e/K sum over classes c of w(c) (-log p(c))]
                         ---------------------------------------------------------------------------------------------
                                                      sum over documents of w(y)
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    @property
    def plain(self) -> DocumentLoss:
        """Cross-entropy."""
        return PLAIN_LOSS

    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of targets int64 [documents]."""
        scores, given = logits.float(), self.class_weights
        weights = None if given is None else constant_on(given, scores.device)
        smoothing = self.label_smoothing
        return functional.cross_entropy(scores, targets, weights, reduction="sum", label_smoothing=smoothing)

    def denominator(self, labels: np.ndarray) -> float:
        """Sum of the weights of documents of these classes, int [documents]; without weights, their number."""
        if self.class_weights is None:
            return len(labels)
        # rounded as in `summed`
        weights = np.array(self.class_weights, np.float32).astype(np.float64)
        return float(np.bincount(labels, minlength=len(weights)) @ weights)


PLAIN_LOSS = ClassLoss()


@dataclass(frozen=True)
class SquaredError(DocumentLoss):
    """The squared difference between the model's one output and a number."""

    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of targets float32 [documents]."""
        return functional.mse_loss(logits.float().squeeze(1), targets, reduction="sum")

    def denominator(self, labels: np.ndarray) -> float:
        """The number of documents."""
        return len(labels)


@dataclass(frozen=True)
class LabelLoss(DocumentLoss):
    """The binary cross-entropy of each label of a document, with weights of the labels that it has (None: all 1).

    It is torch's `binary_cross_entropy_with_logits(pos_weight=...)` over the whole global batch: a label of weight 3
    counts three times where a document has it, and once where it has not.
    """

    class_weights: tuple[float, ...] | None = None

    @property
    def plain(self) -> DocumentLoss:
        """Without weights."""
        return LabelLoss()

    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of targets float32 [documents, labels]."""
        scores = logits.float()
        weights = None if self.class_weights is None else constant_on(self.class_weights, scores.device)
        return functional.binary_cross_entropy_with_logits(scores, targets, pos_weight=weights, reduction="sum")

    def denominator(self, labels: np.ndarray) -> float:
        """The number of documents and labels."""
        return labels.size


def loss_of(task_type: str) -> DocumentLoss:
    """The loss of a kind of labels, without weights and smoothing."""
    if task_type == REGRESSION:
        return SquaredError()
    return LabelLoss() if task_type == MULTI_LABEL else PLAIN_LOSS


def choose_weights(
    class_weights: str | Sequence[float] | None, labels: np.ndarray, classes: int
) -> tuple[float, ...] | None:
    """Weights by class or label, of the recipe's `balanced`, one weight per class, or None.

    `balanced` is scikit-learn's: documents / (classes * documents of the class), so that every class has the same sum
    over the `labels` of the training data, int [documents]. Of several labels a document, [documents, labels], it is
    documents without the label / documents with it.
    """
    if class_weights is None:
        return None
    if class_weights == "balanced":
        several = labels.ndim > 1
        counts = labels.sum(axis=0, dtype=np.int64) if several else np.bincount(labels, minlength=classes)
        kind = "label" if several else "class"
        if not counts.all():
            raise UserError(f"class_weights: balanced: {kind} {int(counts.argmin())} has no row to be weighted by")
        if several and counts.max() == len(labels):
            raise UserError(f"class_weights: balanced: label {int(counts.argmax())} is in every row: leave it out")
        if several:
            return tuple(((len(labels) - counts) / counts).tolist())
        return tuple((len(labels) / (classes * counts)).tolist())
    if len(class_weights) != classes:
        raise UserError(
            f"class_weights has {len(class_weights)} numbers, and the data has {classes} "
            f"{'labels' if labels.ndim > 1 else 'classes'}: give one for each"
        )
    return tuple(float(weight) for weight in class_weights)
