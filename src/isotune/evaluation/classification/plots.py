"""Plots of a classifier's predictions, each with its alternative text in a .txt file beside it.

They are drawn on matplotlib's Agg canvas without pyplot: no display, no global state.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.evaluation.classification.evaluate import Evaluation
from isotune.evaluation.classification.figures import COLOURS, grid, new_figure, save_plot, short_name
from isotune.evaluation.classification.label_plots import draw_labels, draw_numbers
from isotune.evaluation.metrics.classification import BINS, bin_of, confidences

WIDE_CELL, LARGEST_SIDE, FEW_CLASSES = 0.75, 14.0, 12  # inches of a confusion matrix, which shrinks its cells for more
POINTS_PER_INCH, LARGEST_FONT, READABLE_FONT = 72, 9.0, 4.5  # points
RECALLS = (0.5, 0.8, 0.9, 0.95)


def draw_plots(evaluation: Evaluation, folder: Path) -> None:
    """Confusion matrix, precision-recall curve and reliability diagram in `folder`.

    Of several labels a text the curves and a bar a label, of numbers a scatter plot: they have no confusion matrix, and
    no probability of one class.
    """
    labels, probabilities, names = evaluation.rows.labels, evaluation.outputs, evaluation.rows.names
    if evaluation.task_type == REGRESSION:
        draw_numbers(labels, probabilities, folder / "predicted.png")
        return
    truths = labels == 1 if evaluation.task_type == MULTI_LABEL else labels[:, None] == np.arange(len(names))
    _draw_precision_recall(truths, probabilities, names, folder / "precision_recall.png")
    if evaluation.task_type == MULTI_LABEL:
        draw_labels(labels, probabilities, names, folder / "labels.png", evaluation.rows.thresholds)
        return
    _draw_confusion(labels, probabilities.argmax(axis=1), names, folder / "confusion_matrix.png")
    _draw_reliability(labels, probabilities, folder / "reliability.png")


def _draw_confusion(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], file: Path) -> None:
    """Number of texts of each class (a row) by predicted class (a column), shaded by the share of the row."""
    from sklearn.metrics import confusion_matrix

    classes = len(names)
    counts = confusion_matrix(labels, predictions, labels=range(classes))
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = float(np.clip(1.1 + WIDE_CELL * classes, 3.6, LARGEST_SIDE))
    figure, panel = new_figure(side + 1.2, side)
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    cell = POINTS_PER_INCH * min(WIDE_CELL, (side - 1.1) / classes)
    font = min(LARGEST_FONT, cell / 5)  # of a line of six characters
    for (row, column), count in np.ndenumerate(counts) if font >= READABLE_FONT else ():
        if count or classes <= FEW_CLASSES:
            colour = "white" if shares[row, column] > 0.6 else "black"
            text = f"{count:,}\n{shares[row, column]:.0%}"
            panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=font)
    every = max(1, math.ceil(READABLE_FONT / cell))  # class is named, where not all names are readable
    short, at = [short_name(name) for name in names[::every]], range(0, classes, every)
    slant = 90 if classes > FEW_CLASSES else 0 if max(map(len, short)) < 8 else 30
    size = min(LARGEST_FONT + 1, max(READABLE_FONT, 0.8 * cell))
    panel.set_xticks(at, short, rotation=slant, ha="center", fontsize=size)
    panel.set_yticks(at, short, fontsize=size)
    panel.set(xlabel="predicted", ylabel="actual")
    panel.set_title("Confusion matrix", loc="left")
    figure.colorbar(image, ax=panel, label="share of the actual class", fraction=0.046)
    lines = [f"Confusion matrix of {counts.sum():,} texts in {classes} classes."]
    for name, row in zip(names, counts, strict=True):
        predicted = [f"{row[k]:,} as {names[k]}" for k in np.argsort(-row, kind="stable")[:6] if row[k]]
        lines.append(f"Of {row.sum():,} texts of class {name}: {', '.join(predicted) or 'none predicted'}.")
    save_plot(figure, file, lines)


def _draw_precision_recall(truths: np.ndarray, probabilities: np.ndarray, names: Sequence[str], file: Path) -> None:
    """Precision over recall of each class or label, whose `truths` are bool [rows, classes]; of class 1 of two."""
    one_suffices = len(names) == 2 and (truths.sum(axis=1) == 1).all()  # the other one is its mirror image
    classes = [1] if one_suffices else list(range(len(names)))
    figure, panel = new_figure(6.4, 4.8)
    lines = ["Precision-recall curves: precision at falling thresholds of the probability."]
    for place, k in enumerate(classes):
        truth = truths[:, k]
        if not truth.any() or truth.all():
            lines.append(f"Class {names[k]}: no curve, {'all' if truth.any() else 'none'} of the texts are of it.")
            continue
        recall, precision = precision_recall(truth, probabilities[:, k])
        colour, style = COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]
        area = float(np.diff(recall, prepend=0) @ precision)
        legend = f"{short_name(names[k])} ({area:.3f})"
        # the precision of the highest threshold holds from recall 0 on, as in the area
        steps = np.insert(recall, 0, 0.0), np.insert(precision, 0, precision[0])
        panel.step(*steps, where="pre", color=colour, linestyle=style, label=legend, linewidth=1.6)
        panel.axhline(truth.mean(), color=colour, linewidth=0.7, linestyle=(0, (1, 3)))
        at = ", ".join(f"{precision[np.searchsorted(recall, r)]:.3f} at recall {r:g}" for r in RECALLS)
        of_class = f"average precision {area:.3f}, {truth.mean():.1%} of the texts; precision {at}"
        lines.append(f"Class {names[k]}: {of_class}.")
    panel.set(xlim=(0, 1.005), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    panel.set_title("Precision and recall; dotted: the share of the class, which is chance", loc="left", fontsize=10)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(title="class (average precision)", frameon=False, fontsize=8, ncols=1 + (len(classes) > 12))
    grid(panel)
    save_plot(figure, file, lines)


def _draw_reliability(labels: np.ndarray, probabilities: np.ndarray, file: Path) -> None:
    """Accuracy (with 95% Wilson intervals) over confidence, bin by bin, and the number of texts in each bin."""
    confidence, correct = confidences(labels, probabilities)
    bins = bin_of(confidence)
    rows = np.bincount(bins, minlength=BINS)
    filled = rows > 0
    counts = rows[filled]
    mean_confidence = np.bincount(bins, confidence, BINS)[filled] / counts
    accuracy = np.bincount(bins, correct, BINS)[filled] / counts
    low, high = wilson(accuracy, counts)
    figure, (panel, below) = new_figure(5.6, 6.2, rows=2, height_ratios=(3, 1))
    panel.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle="--", label="calibrated")
    errors = [np.maximum(accuracy - low, 0), np.maximum(high - accuracy, 0)]
    style: dict[str, Any] = {"color": COLOURS[0], "fmt": "o-", "capsize": 3, "linewidth": 1.4}
    panel.errorbar(mean_confidence, accuracy, errors, label="this classifier, 95%", **style)
    panel.set(xlim=(0, 1.01), ylim=(0, 1.02), ylabel="accuracy")
    panel.legend(frameon=False, fontsize=9, loc="upper left")
    error = float(np.abs(mean_confidence - accuracy) @ counts / counts.sum())
    panel.set_title(f"Reliability; expected calibration error {error:.3f}", loc="left")
    below.bar((np.arange(BINS) + 0.5) / BINS, rows, width=0.9 / BINS, color=COLOURS[5])
    below.set(xlim=(0, 1.01), xlabel="probability of the predicted class", ylabel="texts")
    for axes in (panel, below):
        grid(axes)
    lines = [f"Reliability diagram of {rows.sum():,} texts; expected calibration error {error:.3f}."]
    for n, sure, share, a, b in zip(counts, mean_confidence, accuracy, low, high, strict=True):
        lines.append(f"{n:,} texts at a mean probability of {sure:.3f}: {share:.3f} right (95% {a:.3f} to {b:.3f}).")
    save_plot(figure, file, lines)


def precision_recall(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall, rising to 1, and precision at the thresholds of the scores, from the highest down: [distinct scores]."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, scores)
    return recall[-2::-1], precision[-2::-1]  # the last point, at recall 0, is of no threshold


def wilson(share: np.ndarray, rows: np.ndarray, deviations: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a share observed in `rows` rows (Wilson 1927)."""
    spread = deviations**2 / rows
    middle = (share + spread / 2) / (1 + spread)
    half = deviations * np.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    return middle - half, middle + half
