"""Three pictures of a classifier's predictions, each with the same said in words in a .txt beside it.

Drawn on matplotlib's Agg canvas without pyplot: no display, no global state. The colours are Okabe and Ito's (2008),
told apart with any common colour blindness.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isotune.evaluation.classification.result import Evaluation
from isotune.evaluation.metrics.probabilities import BINS, bin_of, confidences
from isotune.io.files import replace_file, replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CONFUSION, PRECISION_RECALL, RELIABILITY = "confusion_matrix.png", "precision_recall.png", "reliability.png"
DOTS_PER_INCH = 130
LARGEST_WRITTEN_OUT = 12  # classes of a confusion matrix whose cells hold numbers
RECALLS = (0.5, 0.8, 0.9, 0.95)


def draw_pictures(done: Evaluation, folder: Path) -> list[Path]:
    """Confusion matrix, precision-recall curve and reliability diagram in `folder`."""
    labels, probabilities, names = done.rows.labels, done.probabilities, done.rows.names
    return [
        draw_confusion(labels, probabilities.argmax(axis=1), names, folder),
        draw_precision_recall(labels, probabilities, names, folder),
        draw_reliability(labels, probabilities, folder),
    ]


def draw_confusion(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], folder: Path) -> Path:
    """How often each class (a row) was taken for each (a column): numbers of texts, shaded by the share of the row."""
    classes = len(names)
    counts = np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = float(np.clip(1.1 + 0.75 * classes, 3.6, 11))
    figure, panel = new_figure(side + 1.2, side)
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if classes <= LARGEST_WRITTEN_OUT:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.6 else "black"
            said = f"{count:,}\n{shares[row, column]:.0%}"
            panel.text(column, row, said, ha="center", va="center", color=colour, fontsize=9)
        short = [_short(name) for name in names]
        panel.set_xticks(range(classes), short, rotation=0 if max(map(len, short)) < 8 else 30, ha="center")
        panel.set_yticks(range(classes), short)
    panel.set_xlabel("predicted")
    panel.set_ylabel("actual")
    panel.set_title("Confusion matrix", loc="left")
    figure.colorbar(image, ax=panel, label="share of the actual class", fraction=0.046)
    words = [f"Confusion matrix of {counts.sum():,} texts in {classes} classes."]
    for row in range(classes):
        off = [
            f"{counts[row, k]:,} as {names[k]}" for k in np.argsort(-counts[row], kind="stable")[:6] if counts[row, k]
        ]
        words.append(f"Of {totals[row, 0]:,} texts of class {names[row]}: {', '.join(off) or 'none predicted'}.")
    return save_picture(figure, folder / CONFUSION, words)


def draw_precision_recall(labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str], folder: Path) -> Path:
    """Precision over recall as the threshold falls: of class 1 of two classes, else of each against the others."""
    classes = [1] if len(names) == 2 else list(range(len(names)))
    figure, panel = new_figure(6.4, 4.8)
    words = ["Precision-recall curves: precision at falling thresholds of the probability."]
    for place, k in enumerate(classes):
        truth = labels == k
        if not truth.any() or truth.all():
            words.append(f"Class {names[k]}: no curve, {'all' if truth.any() else 'none'} of the texts are of it.")
            continue
        recall, precision = precision_recall(truth, probabilities[:, k])
        colour, style = COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]
        area = float(np.diff(recall, prepend=0) @ precision)
        legend = f"{_short(names[k])} ({area:.3f})"
        panel.step(recall, precision, where="pre", color=colour, linestyle=style, label=legend, linewidth=1.6)
        panel.axhline(truth.mean(), color=colour, linewidth=0.7, linestyle=(0, (1, 3)))
        at = ", ".join(f"{precision[np.searchsorted(recall, r)]:.3f} at recall {r:g}" for r in RECALLS)
        words.append(
            f"Class {names[k]}: average precision {area:.3f}, {truth.mean():.1%} of the texts; precision {at}."
        )
    panel.set(xlim=(0, 1.005), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    panel.set_title("Precision and recall; dotted: the share of the class, what chance gives", loc="left", fontsize=10)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(title="class (average precision)", frameon=False, fontsize=8, ncols=1 + (len(classes) > 12))
    _grid(panel)
    return save_picture(figure, folder / PRECISION_RECALL, words)


def draw_reliability(labels: np.ndarray, probabilities: np.ndarray, folder: Path) -> Path:
    """How often right (with 95% Wilson intervals) beside how sure, bin by bin, and how many texts are in each bin."""
    confidence, right = confidences(labels, probabilities)
    bins = bin_of(confidence)
    rows = np.bincount(bins, minlength=BINS)
    held = np.flatnonzero(rows)
    sure = np.bincount(bins, confidence, BINS)[held] / rows[held]
    often = np.bincount(bins, right, BINS)[held] / rows[held]
    low, high = wilson(often, rows[held])
    figure, (panel, below) = new_figure(5.6, 6.2, panels=2, height_ratios=(3, 1))
    panel.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle="--", label="as sure as right")
    spread = [np.maximum(often - low, 0), np.maximum(high - often, 0)]
    panel.errorbar(
        sure, often, spread, color=COLOURS[0], fmt="o-", capsize=3, linewidth=1.4, label="this classifier, 95%"
    )
    panel.set(xlim=(0, 1.01), ylim=(0, 1.02), ylabel="share that is right")
    panel.legend(frameon=False, fontsize=9, loc="upper left")
    error = float(np.abs(sure - often) @ rows[held] / rows.sum())
    panel.set_title(f"Reliability; expected calibration error {error:.3f}", loc="left")
    below.bar((np.arange(BINS) + 0.5) / BINS, rows, width=0.9 / BINS, color=COLOURS[5])
    below.set(xlim=(0, 1.01), xlabel="probability of the predicted class", ylabel="texts")
    for one in (panel, below):
        _grid(one)
    words = [
        f"Reliability diagram of {rows.sum():,} texts; expected calibration error {error:.3f}.",
        *(
            f"{n:,} texts at a mean probability of {s:.3f}: {o:.3f} right (95% {a:.3f} to {b:.3f})."
            for n, s, o, a, b in zip(rows[held], sure, often, low, high, strict=True)
        ),
    ]
    return save_picture(figure, folder / RELIABILITY, words)


def precision_recall(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall, rising to 1, and precision when all rows of at least some score are taken: [different scores]."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True))
    hits = np.cumsum(truth[order])[last]
    return hits / hits[-1], hits / (last + 1)


def wilson(share: np.ndarray, rows: np.ndarray, deviations: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a share seen in so many rows (Wilson 1927)."""
    spread = deviations**2 / rows
    middle = (share + spread / 2) / (1 + spread)
    half = deviations * np.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    return middle - half, middle + half


def new_figure(width: float, height: float, *, panels: int = 1, **how: Any) -> tuple[Any, Any]:
    """A figure in inches with panels one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(panels, 1, **how)


def save_picture(figure: Any, file: Path, words: Sequence[str]) -> Path:
    """Write a picture and its alternative in words, each renamed into place when whole."""
    with replacing(file) as staging:
        figure.savefig(staging, format="png", dpi=DOTS_PER_INCH)
    replace_file(file.with_suffix(".txt"), "\n".join(words) + "\n")
    return file


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _grid(panel: Any) -> None:
    panel.grid(color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
