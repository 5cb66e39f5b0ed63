"""The curves of one or several runs as geometry that the report's template draws: no picture files, no scripts.

A chart is small and the report shows several side by side, so that each is read on a phone as on a desk. Colours are
names of the style sheet, which has one set for light and one for dark; lines of different runs differ in dashes too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isotune.report.curves import smoothed
from isotune.report.run_record import RunRecord
from isotune.report.wording import letter, number

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
MOST_POINTS = 400  # of a line; more cannot be told apart at this size
_WINDOW_SHARE = 0.1

# key of a training line, key of an evaluation line, title, unit
CURVES: tuple[tuple[str | None, str | None, str, str], ...] = (
    ("loss", "eval_loss", "Loss", "nats"),
    ("accuracy", "eval_accuracy", "Accuracy", "share of documents"),
    (None, "eval_perplexity", "Perplexity of the evaluation", "per token"),
    ("grad_norm", None, "Gradient norm", "before clipping"),
    ("learning_rate", None, "Learning rate", ""),
    ("tokens_per_second", None, "Speed", "tokens a second"),
    ("peak_memory_bytes", None, "Peak memory", "GB"),
)
_SCALE = {"peak_memory_bytes": 1e-9}


@dataclass(frozen=True)
class Line:
    """A line of a chart: `style` is its class in the style sheet; `paths` are its unbroken pieces in SVG's words."""

    label: str
    style: str
    paths: list[str]
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn.

    Attributes:
        title, unit: of what is on the y axis.
        summary: in words, for who does not see it.
        x_ticks, y_ticks: place and text.
    """

    title: str
    unit: str
    summary: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass
class _Series:
    label: str
    style: str
    steps: list[int]
    values: np.ndarray
    dotted: bool = False
    summary: str = field(default="")


def draw_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """A chart of each quantity that any of the runs has."""
    charts = []
    for training, evaluation, title, unit in CURVES:
        series = [
            one
            for place, record in enumerate(records)
            for one in _series(record, place, len(records) > 1, training, evaluation)
        ]
        if series:
            charts.append(_chart(title, unit, series))
    return charts


def _series(
    record: RunRecord, place: int, several: bool, training: str | None, evaluation: str | None
) -> list[_Series]:
    found = []
    run = f"{letter(place)} " if several else ""
    colour = f"run{place % 6}" if several else ""
    steps, values = _column(record.steps, training)
    if steps:
        summary = _in_words(f"{run}training".strip(), steps, values)
        window = max(_WINDOW_SHARE * len(steps), 4.0)
        smooth = training == "loss" and np.isfinite(values).sum() >= 10
        if smooth:
            if not several:
                found.append(_Series("training, each step", "raw", steps, values, len(steps) < 30))
            label = f"{run}training, averaged over {window:.0f} steps"
            found.append(_Series(label, colour or "main", steps, smoothed(values, window), summary=summary))
        else:
            found.append(_Series(f"{run}training", colour or "main", steps, values, len(steps) < 30, summary))
    steps, values = _column(record.evaluations, evaluation)
    if steps:
        summary = _in_words(f"{run}evaluation".strip(), steps, values)
        found.append(_Series(f"{run}evaluation", f"{colour} evaluation".strip(), steps, values, True, summary))
    return found


def _column(lines: dict[int, dict[str, Any]], key: str | None) -> tuple[list[int], np.ndarray]:
    """Steps and finite values of a key, NaN between them where it is null; nothing where no line has it."""
    if key is None:
        return [], np.array([])
    there = {step: line[key] for step, line in lines.items() if key in line}
    values = np.array([_finite(value) for value in there.values()]) * _SCALE.get(key, 1.0)
    return (list(there), values) if np.isfinite(values).any() else ([], np.array([]))


def _finite(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def _in_words(label: str, steps: Sequence[int], values: np.ndarray) -> str:
    known = np.flatnonzero(np.isfinite(values))
    first, last = known[0], known[-1]
    lowest, highest = known[np.argmin(values[known])], known[np.argmax(values[known])]
    if first == last:
        return f"{label}: {number(values[first])} at step {steps[first]}."
    return (
        f"{label}: {number(values[first])} at step {steps[first]}, {number(values[last])} at step {steps[last]}, "
        f"lowest {number(values[lowest])} at step {steps[lowest]}, "
        f"highest {number(values[highest])} at step {steps[highest]}."
    )


def _chart(title: str, unit: str, series: list[_Series]) -> Chart:
    every = np.concatenate([one.values for one in series])
    every = every[np.isfinite(every)]
    y_places = _ticks(float(every.min()), float(every.max()), 5)
    x_places = _ticks(min(one.steps[0] for one in series), max(one.steps[-1] for one in series), 5, whole=True)
    x_low, x_high = x_places[0], x_places[-1]
    y_low, y_high = y_places[0], y_places[-1]

    def x(step: float) -> float:
        return round(LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for one in series:
        steps, values = _thin(np.array(one.steps), one.values)
        points = [(x(s), y(v)) if math.isfinite(v) else None for s, v in zip(steps, values, strict=True)]
        dots = [point for point in points if point] if one.dotted else []
        lines.append(Line(one.label, one.style, _paths(points), dots))
    return Chart(
        title=title,
        unit=unit,
        summary=" ".join(one.summary for one in series if one.summary),
        lines=lines,
        x_ticks=[(x(place), f"{int(place):,}") for place in x_places],
        y_ticks=[(y(place), _tick_text(place, y_places[1] - y_places[0])) for place in y_places],
    )


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers around a range; they reach beyond both of its ends."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        low, high = (low - 1, high + 1) if whole or low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    return [float(place) for place in MaxNLocator(most, integer=whole, min_n_ticks=2).tick_values(low, high)]


def _tick_text(place: float, distance: float) -> str:
    decimals = max(0, -math.floor(math.log10(distance)))
    if decimals > 4 or abs(place) >= 1e6:
        return f"{place:.3g}"
    # a distance of 2.5 or 0.25 needs one digit more
    decimals += not math.isclose(distance * 10**decimals, round(distance * 10**decimals))
    return f"{place:,.{decimals}f}"


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about MOST_POINTS points: of each bucket of steps the lowest and the highest, so that no peak is lost."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    keep = {0, len(steps) - 1}
    for bucket in np.array_split(np.arange(len(steps)), MOST_POINTS // 2):
        known = bucket[np.isfinite(values[bucket])]
        if len(known) < len(bucket):
            keep.add(int(bucket[~np.isfinite(values[bucket])][0]))
        if len(known):
            keep |= {int(known[np.argmin(values[known])]), int(known[np.argmax(values[known])])}
    chosen = sorted(keep)
    return steps[chosen], values[chosen]


def _paths(points: Sequence[tuple[float, float] | None]) -> list[str]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return ["M" + " L".join(f"{x:g},{y:g}" for x, y in piece) for piece in pieces if len(piece) > 1]
