"""RUN/loss_curve.png: loss and accuracy in training and evaluation, and the learning rate."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from isotune.io.errors import UserError
from isotune.io.files import replacing
from isotune.report.curves import (
    MARKED_STEPS,
    MIN_SMOOTHED_VALUES,
    Curve,
    Curves,
    read_curves,
    smoothed,
    smoothing_window,
)
from isotune.run.metrics_reader import METRICS

PICTURE = "loss_curve.png"

# The palette of Okabe and Ito (2008): distinguishable with any common color blindness, and by lightness in gray.
_RAW, _SMOOTH, _EVALUATION, _RATE = "#56B4E9", "#0072B2", "#D55E00", "#444444"
_INCHES = {"loss": 3.6, "accuracy": 2.6, "learning rate": 1.2}


def draw_loss_curve(run_dir: str | Path) -> Path:
    """Draw RUN/loss_curve.png from RUN/metrics.jsonl, and return its path.

    The picture replaces an earlier one atomically.

    Raises:
        UserError: there is no metrics.jsonl, or none of its lines has a step and a loss.
    """
    run_dir = Path(run_dir)
    curves = read_curves(run_dir / METRICS)
    picture = run_dir / PICTURE
    try:
        with replacing(picture) as staging:
            _figure(curves, run_dir.resolve().name).savefig(staging, format="png", dpi=130)
    except OSError as error:
        raise UserError(f"{picture} cannot be written: {error.strerror}") from error
    return picture


def _figure(curves: Curves, title: str) -> Any:
    # a Figure with its own canvas instead of pyplot: no global state, no display, independent of the user's backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = ["loss"]
    names += ["accuracy"] if _has_values(curves.accuracy) else []
    names += ["learning rate"] if _has_values(curves.learning_rate) else []
    heights = [_INCHES[name] for name in names]
    figure = Figure(figsize=(8.0, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    column = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels = dict(zip(names, column, strict=True))
    _draw(panels["loss"], curves.loss, "loss", "{:.3f}")
    panels["loss"].set_title(
        f"Loss {'and accuracy ' if 'accuracy' in panels else ''}of {title}", loc="left", fontsize=12
    )
    panels["loss"].legend(frameon=False, fontsize=9)
    panels["loss"].set_ylabel(f"loss (nats per {curves.target})")
    if "accuracy" in panels:
        _draw(panels["accuracy"], curves.accuracy, "accuracy", "{:.1%}")
        panels["accuracy"].set_ylabel("accuracy")
        panels["accuracy"].yaxis.set_major_formatter(PercentFormatter(1.0))
    if "learning rate" in panels:
        _draw_rate(panels["learning rate"], curves.learning_rate)
    for panel in column:
        panel.grid(color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    column[-1].set_xlabel("step (optimizer updates)")
    column[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _has_values(curve: Curve) -> bool:
    return any(math.isfinite(value) for value in [*curve.values, *curve.eval_values])


def _draw(panel: Any, curve: Curve, name: str, value_format: str) -> None:
    """Draw training by step, smoothed and by epoch, and the evaluations with their last value as text."""
    steps, values = curve.steps, np.array(curve.values, dtype=float)
    finite = np.isfinite(values)
    if finite.any():
        marker = _marker(steps)
        panel.plot(steps, values, color=_RAW, linewidth=0.9, alpha=0.8, marker=marker, markersize=4, label="training")
        if finite.sum() >= MIN_SMOOTHED_VALUES:
            window = smoothing_window(len(steps))
            label = f"training, averaged over {window:.0f} steps"
            panel.plot(steps, smoothed(values, window), color=_SMOOTH, linewidth=2.0, label=label)
    if curve.epoch_steps:
        points = {"color": _SMOOTH, "markersize": 7, "markeredgecolor": "white", "label": "training, mean of the epoch"}
        panel.plot(curve.epoch_steps, curve.epoch_values, "o", zorder=4, **points)
    not_finite = [step for step, is_finite in zip(steps, finite, strict=True) if not is_finite]
    if not_finite:
        label = f"{name} not finite ({len(not_finite)} step{'s' if len(not_finite) > 1 else ''})"
        panel.plot(
            not_finite, [0.02] * len(not_finite), "x", color="black", transform=panel.get_xaxis_transform(), label=label
        )
    evaluated = [(s, v) for s, v in zip(curve.eval_steps, curve.eval_values, strict=True) if math.isfinite(v)]
    if evaluated:
        points = {"color": _EVALUATION, "linewidth": 1.0, "markersize": 5, "label": "evaluation"}
        panel.plot(*zip(*evaluated, strict=True), "D--", zorder=5, **points)
        step, value = evaluated[-1]
        placement = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        panel.annotate(value_format.format(value), (step, value), color=_EVALUATION, **placement)


def _draw_rate(panel: Any, curve: Curve) -> None:
    from matplotlib.ticker import ScalarFormatter

    panel.plot(curve.steps, curve.values, color=_RATE, linewidth=1.2, marker=_marker(curve.steps))
    panel.set_ylabel("learning rate")
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-2, 3))
    panel.yaxis.set_major_formatter(formatter)
    panel.set_ylim(bottom=0)


def _marker(steps: list[int]) -> str:
    """A dot at each point of a short line, which would otherwise show little or nothing."""
    return "o" if len(steps) < MARKED_STEPS else ""
