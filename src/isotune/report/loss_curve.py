"""One picture of a run: what the loss did, where it was evaluated, and the learning rate that drove it."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isotune.errors import UserError

METRICS = "metrics.jsonl"
PICTURE = "loss_curve.png"

# Okabe and Ito's palette (2008): told apart by people with any common colour blindness, and by lightness in grey.
_RAW, _SMOOTH, _EVALUATION, _RATE = "#56B4E9", "#0072B2", "#D55E00", "#444444"
_WINDOW_SHARE = 0.1  # of the run, that one value of the smoothed curve looks at


@dataclass
class Curves:
    """What metrics.jsonl says of a run, as steps and values of the same length.

    Losses are nats per supervised token; a value that is missing, null or not finite is NaN.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)


def draw_loss_curve(run_dir: str | Path) -> Path:
    """Draw RUN/loss_curve.png from RUN/metrics.jsonl, and return its path.

    The picture is written beside its name and renamed, so that an earlier one is never half replaced.

    Raises:
        UserError: there is no metrics.jsonl, or no line of it has a step and a loss.
    """
    run_dir = Path(run_dir)
    curves = read_curves(run_dir / METRICS)
    picture = run_dir / PICTURE
    unfinished = picture.with_name(f".{PICTURE}.{os.getpid()}")
    try:
        _figure(curves, run_dir.resolve().name).savefig(unfinished, format="png", dpi=130)
        os.replace(unfinished, picture)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{picture} cannot be written: {error.strerror}") from error
    return picture


def read_curves(metrics: Path) -> Curves:
    """Read the training and evaluation lines; a line that is no JSON object is passed over.

    The last line of a killed run may be cut off, and one bad line must not cost the picture of all others. A step
    that was written twice, because a killed run resumed before it, counts as it was written last.

    Raises:
        UserError: the file cannot be read, or holds no loss.
    """
    try:
        text = metrics.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{metrics} cannot be read: {error.strerror}; give the folder of a run") from error
    training: dict[int, tuple[float, float]] = {}
    evaluation: dict[int, float] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        if "loss" in entry:
            training[entry["step"]] = (_number(entry["loss"]), _number(entry.get("learning_rate")))
        if "eval_loss" in entry:
            evaluation[entry["step"]] = _number(entry["eval_loss"])
    if not training and not evaluation:
        raise UserError(f"{metrics} has no line with a step and a loss: the run has not made a step yet")
    curves = Curves()
    for step, (loss, rate) in sorted(training.items()):
        curves.steps.append(step)
        curves.losses.append(loss)
        curves.learning_rates.append(rate)
    for step, loss in sorted(evaluation.items()):
        curves.eval_steps.append(step)
        curves.eval_losses.append(loss)
    return curves


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


def _figure(curves: Curves, title: str) -> Any:
    # Figure with its own canvas instead of pyplot: no global state, no display, whatever the user's backend is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    has_rate = any(math.isfinite(rate) for rate in curves.learning_rates)
    figure = Figure(figsize=(8.0, 5.6 if has_rate else 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if has_rate else 1, 1, sharex=True, squeeze=False, height_ratios=(4, 1)[: 1 + has_rate])
    loss_panel = panels[0][0]
    _draw_losses(loss_panel, curves)
    loss_panel.set_title(f"Loss of {title}", loc="left", fontsize=12)
    loss_panel.set_ylabel("loss (nats per supervised token)")
    if has_rate:
        rate_panel = panels[1][0]
        rate_panel.plot(curves.steps, curves.learning_rates, color=_RATE, linewidth=1.2, marker=_dot(curves.steps))
        rate_panel.set_ylabel("learning rate")
        formatter = ScalarFormatter(useMathText=True)
        formatter.set_powerlimits((-2, 3))
        rate_panel.yaxis.set_major_formatter(formatter)
        rate_panel.set_ylim(bottom=0)
    for (panel,) in panels:
        panel.grid(color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    bottom = panels[-1][0]
    bottom.set_xlabel("step (optimizer updates)")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _draw_losses(panel: Any, curves: Curves) -> None:
    steps, losses = curves.steps, np.array(curves.losses, dtype=float)
    finite = np.isfinite(losses)
    if finite.any():
        marker = _dot(steps)
        panel.plot(steps, losses, color=_RAW, linewidth=0.9, alpha=0.8, marker=marker, markersize=4, label="training")
        if finite.sum() >= 10:  # fewer points are read by eye
            window = max(_WINDOW_SHARE * len(steps), 4.0)
            label = f"training, averaged over {window:.0f} steps"
            panel.plot(steps, smoothed(losses, window), color=_SMOOTH, linewidth=2.0, label=label)
    lost = [step for step, known in zip(steps, finite, strict=True) if not known]
    if lost:
        label = f"loss not finite ({len(lost)} step{'s' if len(lost) > 1 else ''})"
        panel.plot(lost, [0.02] * len(lost), "x", color="black", transform=panel.get_xaxis_transform(), label=label)
    evaluated = [(s, v) for s, v in zip(curves.eval_steps, curves.eval_losses, strict=True) if math.isfinite(v)]
    if evaluated:
        points = {"color": _EVALUATION, "linewidth": 1.0, "markersize": 5, "label": "evaluation"}
        panel.plot(*zip(*evaluated, strict=True), "D--", **points)
        step, value = evaluated[-1]
        panel.annotate(
            f"{value:.3f}", (step, value), xytext=(0, 8), textcoords="offset points", ha="right", color=_EVALUATION
        )
    panel.legend(frameon=False, fontsize=9)


def _dot(steps: list[int]) -> str:
    """A line through one or a few points would show nothing or little: mark them."""
    return "o" if len(steps) < 30 else ""
