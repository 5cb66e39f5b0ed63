"""Curves of one or several runs as SVG geometry that the report's template draws, without image files or scripts.

Charts are small, and the report shows several side by side, so they are readable on a phone. Colors are classes of the
style sheet, which has a light and a dark set; lines of different runs also differ in their dashes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from isotune.config.task_types import REGRESSION
from isotune.report.formatting import format_number, run_letter
from isotune.report.loss_curve import (
    MARKED_STEPS,
    MIN_SMOOTHED_VALUES,
    downsample,
    smoothed,
    smoothing_window,
    window_in_steps,
)
from isotune.report.run_record import RunRecord
from isotune.run.step_lines import StepLines, steps_in_words

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
MAX_POINTS = 400  # of a line; more are indistinguishable at this size

# key of a training line, key of an evaluation line, title, unit
CURVES: tuple[tuple[str | None, str | None, str, str], ...] = (
    ("loss", "eval_loss", "Loss", "nats"),
    ("accuracy", "eval_accuracy", "Accuracy", "share of documents"),
    ("exact_match", "eval_exact_match", "Exact match", "share of documents"),
    (None, "eval_f1_micro", "Micro F1 of the evaluation", "share"),
    (None, "eval_pearson", "Pearson correlation", ""),
    (None, "eval_mean_absolute_error", "Mean absolute error", ""),
    (None, "eval_perplexity", "Perplexity of the evaluation", "per token"),
    ("grad_norm", None, "Gradient norm", "before clipping"),
    ("learning_rate", None, "Learning rate", ""),
    ("tokens_per_second", None, "Speed", "tokens a second"),
    ("peak_memory_bytes", None, "Peak memory", "GB"),
)
_SCALE = {"peak_memory_bytes": 1e-9}


@dataclass
class Line:
    """A line of a chart, with the data that it shows."""

    label: str
    style: str  # its CSS class
    steps: np.ndarray
    values: np.ndarray
    has_dots: bool = False
    summary: str = ""
    paths: list[str] = field(default_factory=list)  # its unbroken pieces as SVG path data
    dots: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A chart in pixels: `unit` is that of the y axis, `summary` the chart in words, a tick its position and text."""

    title: str
    unit: str
    summary: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def draw_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """One chart for each metric that any of the runs has, all over the same steps."""
    runs = [f"{run_letter(index)} " for index in range(len(records))] if len(records) > 1 else [""]
    drawn: list[tuple[str, str, list[Line]]] = []
    for *keys, title, unit in CURVES:
        lines = [
            line
            for index, (record, run) in enumerate(zip(records, runs, strict=True))
            for line in _series(record, run, f"run{index % 6}" if run else "", *keys)
        ]
        if lines:
            squared = keys[0] == "loss" and all(record.keys.get("task_type") == REGRESSION for record in records)
            drawn.append((title, "squared error" if squared else unit, lines))
    if not drawn:
        return []
    steps = [line.steps for *_, lines in drawn for line in lines]
    x_ticks = _ticks(min(own[0] for own in steps), max(own[-1] for own in steps), integer=True)
    return [_chart(title, unit, lines, x_ticks) for title, unit, lines in drawn]


def _series(record: RunRecord, run: str, color: str, train_key: str | None, eval_key: str | None) -> Iterator[Line]:
    """The lines of a run; `run` begins their labels, and is empty, as `color` is, for a single run."""
    steps, values = _column(record.steps, train_key)
    if len(steps):
        label = f"{run}training"
        line = Line(label, color or "main", steps, values, len(steps) < MARKED_STEPS, _summary(label, steps, values))
        if train_key == "loss" and np.isfinite(values).sum() >= MIN_SMOOTHED_VALUES:
            if not run:
                each = f"training, each {steps_in_words(record.steps, 0)}"
                yield Line(each, "raw", steps, values, line.has_dots)
            line.label, line.has_dots = f"{run}training, averaged over {window_in_steps(steps):.0f} steps", False
            line.values = smoothed(values, smoothing_window(len(steps)))
        yield line
    steps, values = _column(record.evaluations, eval_key)
    if len(steps):
        label = f"{run}evaluation"
        yield Line(label, f"{color} evaluation".strip(), steps, values, True, _summary(label, steps, values))


def _column(lines: StepLines, key: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key, NaN where a value is not finite; both empty without any finite value."""
    has_key = lines.has(key or "")
    steps, values = lines.steps[has_key], lines.column(key or "")[has_key] * _SCALE.get(key or "", 1.0)
    return (steps, values) if np.isfinite(values).any() else (steps[:0], values[:0])


def _summary(label: str, steps: np.ndarray, values: np.ndarray) -> str:
    finite = np.flatnonzero(np.isfinite(values))
    ends = finite[0], finite[-1], finite[np.argmin(values[finite])], finite[np.argmax(values[finite])]
    first, last, lowest, highest = (f"{format_number(values[index])} at step {steps[index]}" for index in ends)
    if len(finite) == 1:
        return f"{label}: {first}."
    return f"{label}: {first}, {last}, lowest {lowest}, highest {highest}."


def _chart(title: str, unit: str, lines: list[Line], x_ticks: list[float]) -> Chart:
    values = np.concatenate([line.values for line in lines])
    y_ticks = _ticks(float(np.nanmin(values)), float(np.nanmax(values)))
    x_low, x_high, y_low, y_high = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return round(LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    for line in lines:
        steps, values = downsample(line.steps, line.values, MAX_POINTS)
        points = [(x(s), y(v)) if math.isfinite(v) else None for s, v in zip(steps, values, strict=True)]
        pieces = [[point for point in piece if point] for _, piece in groupby(points, bool)]
        line.paths += ["M" + " L".join(f"{x:g},{y:g}" for x, y in piece) for piece in pieces if len(piece) > 1]
        line.dots += [point for point in points if point and line.has_dots]
    return Chart(
        title=title,
        unit=unit,
        summary=" ".join(line.summary for line in lines if line.summary),
        lines=lines,
        x_ticks=[(x(tick), f"{int(tick):,}") for tick in x_ticks],
        y_ticks=[(y(tick), _tick_text(tick, y_ticks[1] - y_ticks[0])) for tick in y_ticks],
    )


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    """About five round numbers that enclose a range."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        low, high = (low - 1, high + 1) if integer or low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    return [float(tick) for tick in MaxNLocator(5, integer=integer, min_n_ticks=2).tick_values(low, high)]


def _tick_text(tick: float, distance: float) -> str:
    decimals = max(0, -math.floor(math.log10(distance)))
    if decimals > 4 or abs(tick) >= 1e6:
        return f"{tick:.3g}"
    # a distance of 2.5 or 0.25 needs one more digit
    decimals += not math.isclose(distance * 10**decimals, round(distance * 10**decimals))
    return f"{tick:,.{decimals}f}"
