"""Plots of numbers, and of several labels a text, in place of the confusion matrix that neither of them has."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from isotune.config.task_types import MULTI_LABEL
from isotune.data.classification.predictions import predicted
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.evaluation.classification.figures import COLOURS, grid, new_figure, save_plot, short_name
from isotune.evaluation.metrics.multi_label import multi_label_statistics
from isotune.evaluation.metrics.regression import regression_statistics
from isotune.evaluation.statistics.resampling import values

FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LARGEST_DRAWN = 60  # labels with a bar


def draw_numbers(labels: np.ndarray, numbers: np.ndarray, file: Path) -> None:
    """Predicted over actual numbers, with the line on which they are equal."""
    figure, panel = new_figure(5.4, 5.2)
    low, high = min(labels.min(), numbers.min()), max(labels.max(), numbers.max())
    panel.plot([low, high], [low, high], color="#777777", linewidth=1, linestyle="--", label="equal")
    panel.scatter(labels, numbers, s=14, alpha=0.5, color=COLOURS[0], linewidths=0, label="a text")
    panel.set(xlabel="actual", ylabel="predicted")
    panel.legend(frameon=False, fontsize=9, loc="upper left")
    found = values(regression_statistics(labels, numbers))
    told = ", ".join(f"{name} {found[name]:.3f}" for name in ("pearson", "spearman", "r2") if np.isfinite(found[name]))
    panel.set_title(f"Predicted and actual numbers; {told or 'no correlation'}", loc="left", fontsize=10)
    grid(panel)
    lines = [f"Predicted over actual numbers of {len(labels):,} texts; {told or 'no correlation is defined'}."]
    ends = np.quantile(labels, FIFTHS)
    for start, stop in pairwise(ends):
        own = (labels >= start) & (labels <= stop)
        mean, error = numbers[own].mean(), np.abs(numbers - labels)[own].mean()
        lines.append(
            f"Actual {start:.3g} to {stop:.3g}: {own.sum():,} texts, predicted {mean:.3g}, off by {error:.3g}."
        )
    save_plot(figure, file, lines)


def draw_labels(
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    file: Path,
    thresholds: Thresholds = THRESHOLD,
) -> None:
    """Precision, recall and F1 of each label; the text beside it is the table of all labels."""
    chosen = predicted(MULTI_LABEL, probabilities, thresholds)
    found = values(multi_label_statistics(labels, probabilities, names, thresholds))
    drawn = list(range(min(len(names), LARGEST_DRAWN)))
    figure, panel = new_figure(6.4, 1.4 + 0.42 * len(drawn))
    kinds = ("precision", "recall", "f1")
    for place, kind in enumerate(kinds):
        shares = [np.nan_to_num(found[f"{kind}[{names[k]}]"]) for k in drawn]
        panel.barh([k + 0.25 * (1 - place) for k in drawn], shares, 0.22, color=COLOURS[place], label=kind)
    panel.set_yticks(drawn, [short_name(names[k]) for k in drawn])
    panel.set(xlim=(0, 1.01), ylim=(len(drawn) - 0.4, -0.6), xlabel="share")
    panel.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    grid(panel)
    of_labels = np.unique(thresholds)
    low = f"{of_labels[0]:g}" + (f" to {of_labels[-1]:g}, by label," if len(of_labels) > 1 else "")
    exact, micro, macro = (found[name] for name in ("exact_match", "f1_micro", "f1_macro"))
    lines = [
        f"Precision, recall and F1 of {len(names)} labels on {len(labels):,} texts, from a probability of {low} on: "
        f"exact match {exact:.3f}, micro F1 {micro:.3f}, macro F1 {macro:.3f}."
    ]
    for k, name in enumerate(names):
        own = {kind: found[f"{kind}[{name}]"] for kind in kinds}
        scores = ", ".join(f"{k} {value:.3f}" if np.isfinite(value) else f"{k} undefined" for k, value in own.items())
        lines.append(f"{name}: {labels[:, k].sum():,} texts, predicted for {chosen[:, k].sum():,}; {scores}.")
    save_plot(figure, file, lines)
