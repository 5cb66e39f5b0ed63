"""What a step and an evaluation of each kind of labels measure beside the loss."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.data.classification.predictions import predicted
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.models.class_loss import constant_on


class LabelKind(ABC):
    """One kind of labels."""

    share: str | None  # what a step's line calls the share of documents that are right; None where none is

    def count(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:  # noqa: B027  (not every kind counts)
        """How many documents are right, int64 []: logits [documents, outputs]."""

    @abstractmethod
    def outputs(self, logits: torch.Tensor) -> np.ndarray:
        """What is predicted: probabilities [documents, outputs], or numbers [documents]."""

    @abstractmethod
    def metrics(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        """The metrics of an evaluation, without their prefix."""


class OneClass(LabelKind):
    """Every document has one class."""

    share = "accuracy"

    def count(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Documents whose class got the highest logit."""
        return (logits.argmax(dim=1) == targets).sum()

    def outputs(self, logits: torch.Tensor) -> np.ndarray:
        """Probabilities of the classes."""
        return logits.softmax(dim=1).numpy()

    def metrics(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        """accuracy, f1_macro."""
        from sklearn.metrics import f1_score  # imported where it is used: it takes a second

        chosen = predicted(SINGLE_LABEL, outputs)
        accuracy = int((chosen == labels).sum()) / len(labels)
        return {"accuracy": accuracy, "f1_macro": float(f1_score(labels, chosen, average="macro"))}


class ManyLabels(LabelKind):
    """Every document has any number of labels: those whose probability reaches the threshold."""

    share = "exact_match"

    def __init__(self, thresholds: Thresholds = THRESHOLD) -> None:
        self.thresholds = thresholds
        self._least = tuple(torch.logit(torch.as_tensor(np.atleast_1d(np.asarray(thresholds, np.float64)))).tolist())

    def count(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Documents of which each label is right."""
        least = constant_on(self._least, logits.device).to(logits.dtype)
        return ((logits >= least) == targets.bool()).all(dim=1).sum()

    def outputs(self, logits: torch.Tensor) -> np.ndarray:
        """The probability of each label."""
        return logits.sigmoid().numpy()

    def metrics(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        """f1_micro, f1_macro over the labels, exact_match; a label that nobody has or predicts has an F1 of 0."""
        from sklearn.metrics import f1_score

        chosen = predicted(MULTI_LABEL, outputs, self.thresholds).astype(np.int64)
        options: dict[str, Any] = {"zero_division": 0}  # declared as a text
        f1 = {a: float(f1_score(labels, chosen, average=a, **options)) for a in ("micro", "macro")}
        exact = int((chosen == labels).all(axis=1).sum()) / len(labels)
        return {"f1_micro": f1["micro"], "f1_macro": f1["macro"], "exact_match": exact}


class Number(LabelKind):
    """Every document has a number."""

    share = None

    def outputs(self, logits: torch.Tensor) -> np.ndarray:
        """The numbers."""
        return logits[:, 0].numpy()

    def metrics(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        """pearson, spearman, mean_absolute_error, r2.

        A correlation that is undefined, because all numbers on one side are equal, is 0: nothing was told apart.
        """
        from scipy.stats import rankdata

        found = np.asarray(outputs, np.float64)
        errors, spread = found - labels, labels - labels.mean()
        r2 = 1 - float(errors @ errors) / float(spread @ spread) if np.ptp(labels) > 0 else 0.0
        pearson, spearman = _correlation(labels, found), _correlation(rankdata(labels), rankdata(found))
        absolute = float(np.abs(errors).mean())
        return {"pearson": pearson, "spearman": spearman, "mean_absolute_error": absolute, "r2": r2}


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    a, b = one - one.mean(), other - other.mean()
    return float(a @ b) / float(np.sqrt((a @ a) * (b @ b)))


KINDS: dict[str, LabelKind] = {SINGLE_LABEL: OneClass(), MULTI_LABEL: ManyLabels(), REGRESSION: Number()}
