"""The curves of a run from metrics.jsonl: values by step and by epoch, evaluations, and the smoothed loss."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isotune.io.errors import UserError
from isotune.run.metrics_reader import read_metrics

MIN_SMOOTHED_VALUES = 10  # fewer points need no smoothed curve
MARKED_STEPS = 30  # a line through fewer steps gets a dot at each
_WINDOW_SHARE = 0.1  # of the steps of a run, for one value of the smoothed curve


@dataclass
class Curve:
    """One metric of a run; steps and values have the same length, and a missing or non-finite value is NaN.

    Attributes:
        steps, values: of training.
        eval_steps, eval_values: of the evaluations.
        epoch_steps, epoch_values: the last step of each complete epoch, and the mean over the epoch's steps, weighted
            by the number of targets.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_values: list[float] = field(default_factory=list)
    epoch_steps: list[int] = field(default_factory=list)
    epoch_values: list[float] = field(default_factory=list)


@dataclass
class Curves:
    """Loss in nats per `target`, accuracy (classification only) and learning rate of a run."""

    loss: Curve
    accuracy: Curve
    learning_rate: Curve
    target: str


def read_curves(metrics: Path) -> Curves:
    """The curves of metrics.jsonl.

    Raises:
        UserError: the file cannot be read, or has no loss.
    """
    try:
        lines = read_metrics(metrics)
    except OSError as error:
        raise UserError(f"{metrics} cannot be read: {error.strerror}; give the folder of a run") from error
    steps, evaluations = list(lines.steps.values()), list(lines.evaluations.values())
    if not steps and not evaluations:
        raise UserError(f"{metrics} has no line with a step and a loss: the run has not made a step yet")
    per_document = any("accuracy" in line or "eval_accuracy" in line for line in [*steps, *evaluations])
    return Curves(
        loss=_curve(steps, evaluations, "loss"),
        accuracy=_curve(steps, evaluations, "accuracy") if per_document else Curve(),
        learning_rate=_curve(steps, [], "learning_rate"),
        target="document" if per_document else "supervised token",
    )


def finite_values(values: Iterable[Any]) -> np.ndarray:
    """Values as float64, NaN for each that is not a finite number."""
    numbers = [v if isinstance(v, int | float) and not isinstance(v, bool) else math.nan for v in values]
    array = np.array(numbers, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def _curve(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], key: str) -> Curve:
    curve = Curve(
        [line["step"] for line in steps],
        finite_values(line.get(key) for line in steps).tolist(),
        [line["step"] for line in evaluations],
        finite_values(line.get(f"eval_{key}") for line in evaluations).tolist(),
    )
    for epoch in _complete_epochs(steps):
        weights = np.array([line.get("supervised_tokens", line.get("documents", 1)) for line in epoch], float)
        values = finite_values(line.get(key) for line in epoch)
        is_finite = np.isfinite(values)
        if is_finite.any():
            curve.epoch_steps.append(epoch[-1]["step"])
            curve.epoch_values.append(float(values[is_finite] @ weights[is_finite] / weights[is_finite].sum()))
    return curve


def _complete_epochs(steps: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The lines of each epoch that has ended."""
    epochs: list[list[dict[str, Any]]] = []
    current: list[dict[str, Any]] = []
    ends = finite_values(line.get("epoch") for line in steps)
    for line, epoch in zip(steps, ends, strict=True):
        current.append(line)
        if math.isfinite(epoch) and abs(epoch - round(epoch)) < 1e-9:
            epochs.append(current)
            current = []
    return epochs


def smoothing_window(steps: int) -> float:
    """Width of the smoothing window of a curve with this many steps, in steps."""
    return max(_WINDOW_SHARE * steps, 4.0)


def smoothed(values: Sequence[float] | np.ndarray, width: float) -> np.ndarray:
    """Average of the values around each one, weighted by a Gaussian with a standard deviation of `width / 4` values.

    The window is centered: a moving average of past values would show each drop of the loss too late. At the ends the
    existing part of the window counts. A value that is not finite has no weight and stays NaN.
    """
    array = np.asarray(values, dtype=float)
    is_finite = np.isfinite(array)
    reach = min(math.ceil(width / 2), len(array) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (width / 4)) ** 2)
    inside = slice(reach, reach + len(array))
    sums = np.convolve(np.where(is_finite, array, 0.0), kernel)[inside]
    weights = np.convolve(is_finite.astype(float), kernel)[inside]
    return np.where(is_finite, sums / np.where(is_finite, weights, 1.0), np.nan)
