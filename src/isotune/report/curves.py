"""What metrics.jsonl says of a run, as numbers to draw: by step, by epoch, and where it was evaluated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isotune.io.errors import UserError
from isotune.report.metrics_lines import read_metrics


@dataclass
class Curve:
    """One figure of a run; steps and values are of the same length, a missing, null or infinite value is NaN.

    Attributes:
        steps, values: of training.
        eval_steps, eval_values: of the evaluations.
        epoch_steps, epoch_values: the last step of each whole epoch, and the mean of the epoch's steps, each weighted
            by its targets.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_values: list[float] = field(default_factory=list)
    epoch_steps: list[int] = field(default_factory=list)
    epoch_values: list[float] = field(default_factory=list)


@dataclass
class Curves:
    """Loss in nats per `target`, accuracy (of classification only) and learning rate of a run."""

    loss: Curve
    accuracy: Curve
    learning_rate: Curve
    target: str


def read_curves(metrics: Path) -> Curves:
    """The curves of the file, as `isotune.report.metrics_lines.read_metrics` reads it.

    Raises:
        UserError: the file cannot be read, or holds no loss.
    """
    try:
        lines = read_metrics(metrics)
    except OSError as error:
        raise UserError(f"{metrics} cannot be read: {error.strerror}; give the folder of a run") from error
    steps, found = list(lines.steps.values()), list(lines.evaluations.values())
    if not steps and not found:
        raise UserError(f"{metrics} has no line with a step and a loss: the run has not made a step yet")
    per_document = any("accuracy" in line or "eval_accuracy" in line for line in [*steps, *found])
    return Curves(
        loss=_curve(steps, found, "loss"),
        accuracy=_curve(steps, found, "accuracy") if per_document else Curve(),
        learning_rate=_curve(steps, [], "learning_rate"),
        target="document" if per_document else "supervised token",
    )


def _curve(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], name: str) -> Curve:
    curve = Curve(
        [line["step"] for line in steps],
        [_number(line.get(name)) for line in steps],
        [line["step"] for line in evaluations],
        [_number(line.get(f"eval_{name}")) for line in evaluations],
    )
    for epoch in _epochs(steps):
        weights = np.array([line.get("supervised_tokens", line.get("documents", 1)) for line in epoch], float)
        values = np.array([_number(line.get(name)) for line in epoch])
        known = np.isfinite(values)
        if known.any():
            curve.epoch_steps.append(epoch[-1]["step"])
            curve.epoch_values.append(float(values[known] @ weights[known] / weights[known].sum()))
    return curve


def _epochs(steps: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The steps of each epoch that was gone through from its start to its end."""
    found: list[list[dict[str, Any]]] = []
    here: list[dict[str, Any]] = []
    for line in steps:
        here.append(line)
        epoch = _number(line.get("epoch"))
        if math.isfinite(epoch) and abs(epoch - round(epoch)) < 1e-9:
            found.append(here)
            here = []
    return found


def smoothed(values: Sequence[float] | np.ndarray, width: float) -> np.ndarray:
    """Average of the values around each one, weighted by a Gaussian with a standard deviation of `width / 4` values.

    A centred window and not a moving average of the past, which would show every fall of the loss too late. At the
    ends the part of the window that exists counts. A value that is not finite counts nowhere and stays NaN.
    """
    numbers = np.asarray(values, dtype=float)
    known = np.isfinite(numbers)
    reach = min(math.ceil(width / 2), len(numbers) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (width / 4)) ** 2)
    inside = slice(reach, reach + len(numbers))
    sums = np.convolve(np.where(known, numbers, 0.0), kernel)[inside]
    weights = np.convolve(known.astype(float), kernel)[inside]
    return np.where(known, sums / np.where(known, weights, 1.0), np.nan)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan
