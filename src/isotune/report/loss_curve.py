"""RUN/loss_curve.png from metrics.jsonl: loss and accuracy in training and evaluation, and the learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isotune.io.errors import UserError
from isotune.io.files import replacing
from isotune.io.reading import Unreadable
from isotune.run.metrics_file import METRICS, read_metrics
from isotune.run.step_lines import StepLines

PICTURE = "loss_curve.png"
MIN_SMOOTHED_VALUES = 10  # fewer points need no smoothed curve
MAX_POINTS = 4000  # of a line; more are indistinguishable at this size
MAX_PRODUCTS = 10_000_000  # of a smoothed curve by plain sums
MARKED_STEPS = 30  # a line through fewer steps gets a dot at each: it would otherwise show little or nothing
_WINDOW_SHARE = 0.1  # of the points of a curve, for one value of the smoothed curve
# The palette of Okabe and Ito (2008): distinguishable with any common color blindness, and by lightness in gray.
_RAW, _SMOOTH, _EVALUATION, _RATE = "#56B4E9", "#0072B2", "#D55E00", "#444444"
_INCHES = {"loss": 3.6, "accuracy": 2.6, "exact_match": 2.6, "pearson": 2.6, "learning_rate": 1.2}
# What a classifier's second panel shows, by what its lines have, and what its loss is in.
_SECOND = {"accuracy": "nats per document", "exact_match": "nats per label", "pearson": "squared error"}


@dataclass
class Curve:
    """One metric of a run; steps and values have the same length, and a missing or non-finite value is NaN."""

    steps: np.ndarray
    values: np.ndarray
    eval_steps: np.ndarray
    eval_values: np.ndarray
    epoch_steps: list[int] = field(default_factory=list)  # the last step of each complete epoch
    epoch_values: list[float] = field(default_factory=list)  # mean over its steps, weighted by the number of targets


def draw_loss_curve(run_dir: str | Path) -> Path:
    """Draw RUN/loss_curve.png from RUN/metrics.jsonl, atomically, and return its path; UserError without any loss."""
    run_dir = Path(run_dir)
    curves = read_curves(run_dir / METRICS)
    picture = run_dir / PICTURE
    try:
        with replacing(picture) as staging:
            _figure(curves, run_dir.resolve().name).savefig(staging, format="png", dpi=130)
    except OSError as error:
        raise UserError(f"{picture} cannot be written: {error.strerror}") from error
    return picture


def read_curves(metrics: Path) -> dict[str, Curve]:
    """Curves by name: `loss`, `learning_rate`, a classifier's `accuracy` or its like; UserError without a loss."""
    try:
        lines = read_metrics(metrics)
    except FileNotFoundError:
        raise UserError(f"{metrics} cannot be read: there is no such file; give the folder of a run") from None
    except Unreadable as reason:
        raise UserError(f"{metrics} cannot be read: {reason}; give the folder of a run") from None
    steps, evaluations = lines.steps, lines.evaluations
    if not steps and not evaluations:
        raise UserError(f"{metrics} has no line with a step and a loss: the run has not made a step yet")
    keys = {key.removeprefix("eval_") for key in steps.keys_of_lines | evaluations.keys_of_lines}
    names = ("loss", *[name for name in _SECOND if name in keys][:1], "learning_rate")
    return {name: _curve(steps, StepLines() if name == "learning_rate" else evaluations, name) for name in names}


def smoothing_window(points: int) -> float:
    """Width of the smoothing window of a curve with this many points, in points."""
    return max(_WINDOW_SHARE * points, 4.0)


def window_in_steps(steps: np.ndarray) -> float:
    """The same window in optimizer updates, where lines are of several steps: `steps` are the last one of each."""
    return smoothing_window(len(steps)) * float(steps[-1] - steps[0]) / max(len(steps) - 1, 1)


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
    sums = _convolved(np.where(is_finite, array, 0.0), kernel)[inside]
    weights = _convolved(is_finite.astype(float), kernel)[inside]
    return np.where(is_finite, sums / np.where(is_finite, weights, 1.0), np.nan)


def _convolved(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`np.convolve`, by Fourier transforms where its time would grow as the square of the steps."""
    if len(values) * len(kernel) <= MAX_PRODUCTS:
        return np.convolve(values, kernel)
    size = len(values) + len(kernel) - 1
    padded = 2 ** math.ceil(math.log2(size))
    return np.fft.irfft(np.fft.rfft(values, padded) * np.fft.rfft(kernel, padded), padded)[:size]


def downsample(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """About `most` points: the lowest and the highest of each bucket of steps, so no peak is lost."""
    if len(steps) <= most:
        return steps, values
    keep = {0, len(steps) - 1}
    for bucket in np.array_split(np.arange(len(steps)), most // 2):
        is_finite = np.isfinite(values[bucket])
        keep |= set(bucket[~is_finite][:1].tolist())
        if is_finite.any():
            keep |= {int(bucket[np.nanargmin(values[bucket])]), int(bucket[np.nanargmax(values[bucket])])}
    indices = sorted(keep)
    return steps[indices], values[indices]


def _curve(steps: StepLines, evaluations: StepLines, key: str) -> Curve:
    values = steps.column(key)
    curve = Curve(steps.steps, values, evaluations.steps, evaluations.column(f"eval_{key}"))
    documents = np.where(steps.has("documents"), steps.column("documents"), 1.0)
    weights = np.where(steps.has("supervised_tokens"), steps.column("supervised_tokens"), documents)
    epochs = steps.column("epoch")
    start = previous = 0
    for end in np.flatnonzero(np.abs(epochs - np.round(epochs)) < 1e-9).tolist():
        part, epoch = slice(start, end + 1), round(epochs[end])
        # lines of several steps may begin in one epoch and end in the next
        is_one_epoch = previous == epoch - 1
        start, previous = end + 1, epoch
        is_finite = np.isfinite(values[part])
        if is_one_epoch and is_finite.any():
            finite, shares = values[part][is_finite], weights[part][is_finite]
            curve.epoch_steps.append(int(curve.steps[end]))
            curve.epoch_values.append(float(finite @ shares / shares.sum()))
    return curve


def _figure(curves: dict[str, Curve], title: str) -> Any:
    # a Figure with its own canvas instead of pyplot: no global state, no display, independent of the user's backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

    finite = {name: np.isfinite([*curve.values, *curve.eval_values]).any() for name, curve in curves.items()}
    names = [name for name in curves if name == "loss" or finite[name]]
    heights = [_INCHES[name] for name in names]
    height = sum(heights) + 0.8
    figure = Figure(figsize=(8.0, height))  # margins in inches: a layout engine draws everything twice to find them
    FigureCanvasAgg(figure)
    column = figure.subplots(
        len(names), 1, sharex=True, squeeze=False, height_ratios=heights,
        gridspec_kw={"left": 0.1, "right": 0.93, "bottom": 0.55 / height, "top": 1 - 0.35 / height, "hspace": 0.12},
    )[:, 0]  # fmt: skip
    figure.align_ylabels(column)
    panels = dict(zip(names, column, strict=True))
    _draw(panels["loss"], curves["loss"], "loss", "{:.3f}")
    second = next((name for name in _SECOND if name in curves), None)
    of_second = f"and {second.replace('_', ' ')} " if second in panels else ""
    panels["loss"].set_title(f"Loss {of_second}of {title}", loc="left", fontsize=12)
    panels["loss"].legend(frameon=False, fontsize=9)
    panels["loss"].set_ylabel(f"loss ({_SECOND.get(second or '', 'nats per supervised token')})")
    if second in panels:
        name, is_share = second.replace("_", " "), second != "pearson"
        _draw(panels[second], curves[second], name, "{:.1%}" if is_share else "{:.3f}")
        panels[second].set_ylabel(name)
        if is_share:
            panels[second].yaxis.set_major_formatter(PercentFormatter(1.0))
    if "learning_rate" in panels:
        panel, rates = panels["learning_rate"], curves["learning_rate"]
        drawn = downsample(rates.steps, rates.values, MAX_POINTS)
        panel.plot(*drawn, color=_RATE, linewidth=1.2, marker=_marker(rates.steps))
        panel.set_ylabel("learning rate")
        formatter = ScalarFormatter(useMathText=True)
        formatter.set_powerlimits((-2, 3))
        panel.yaxis.set_major_formatter(formatter)
        panel.set_ylim(bottom=0)
    for panel in column:
        panel.grid(color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    column[-1].set_xlabel("step (optimizer updates)")
    column[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _draw(panel: Any, curve: Curve, name: str, value_format: str) -> None:
    """Draw training by step, smoothed and by epoch, and the evaluations with their last value as text."""
    steps, values = curve.steps, curve.values
    finite = np.isfinite(values)
    if finite.any():
        marker = _marker(steps)
        style = {"color": _RAW, "linewidth": 0.9, "alpha": 0.8, "marker": marker, "markersize": 4}
        panel.plot(*downsample(steps, values, MAX_POINTS), label="training", **style)
        if finite.sum() >= MIN_SMOOTHED_VALUES:
            window = smoothing_window(len(steps))
            label = f"training, averaged over {window_in_steps(steps):.0f} steps"
            panel.plot(
                *downsample(steps, smoothed(values, window), MAX_POINTS), color=_SMOOTH, linewidth=2.0, label=label
            )
    if curve.epoch_steps:
        points = {"color": _SMOOTH, "markersize": 7, "markeredgecolor": "white", "label": "training, mean of the epoch"}
        panel.plot(curve.epoch_steps, curve.epoch_values, "o", zorder=4, **points)
    not_finite = steps[~finite]
    if len(not_finite):
        label = f"{name} not finite ({len(not_finite)} step{'s' if len(not_finite) > 1 else ''})"
        not_finite = not_finite[:: -(-len(not_finite) // MAX_POINTS)]
        heights = np.full(len(not_finite), 0.02)
        panel.plot(not_finite, heights, "x", color="black", transform=panel.get_xaxis_transform(), label=label)
    evaluated = [(s, v) for s, v in zip(curve.eval_steps, curve.eval_values, strict=True) if math.isfinite(v)]
    if evaluated:
        points = {"color": _EVALUATION, "linewidth": 1.0, "markersize": 5, "label": "evaluation"}
        panel.plot(*zip(*evaluated, strict=True), "D--", zorder=5, **points)
        step, value = evaluated[-1]
        placement = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        panel.annotate(value_format.format(value), (step, value), color=_EVALUATION, **placement)


def _marker(steps: np.ndarray) -> str:
    return "o" if len(steps) < MARKED_STEPS else ""
