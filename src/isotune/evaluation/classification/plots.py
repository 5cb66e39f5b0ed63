"""Plots of a classifier's predictions and attention, each with its alternative text in a .txt file beside it.

They are drawn on matplotlib's Agg canvas without pyplot: no display, no global state. The packed kernels return no
attention weights, so a few texts run once more, one by one, with transformers' eager attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of as implementation_of
from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.documents import FIRST_TYPE
from isotune.evaluation.classification.evaluate import Evaluation, Rows
from isotune.evaluation.classification.examples import examples_of
from isotune.evaluation.classification.figures import COLOURS, grid, new_figure, save_plot, short_name
from isotune.evaluation.classification.label_plots import draw_labels, draw_numbers
from isotune.evaluation.metrics.classification import BINS, bin_of, confidences
from isotune.evaluation.models import Classifier
from isotune.io.errors import first_line
from isotune.models.classifier import takes_token_types
from isotune.models.log_control import quiet_libraries

LARGEST_ANNOTATED = 12  # classes of a confusion matrix with numbers in its cells
RECALLS = (0.5, 0.8, 0.9, 0.95)
EXAMPLES, READABLE_TOKENS = 3, 40  # texts whose attention is drawn
LARGEST_GRID = 12  # layers and heads drawn
LISTED_WORDS, LINE_CHARACTERS = 15, 76


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
    side = float(np.clip(1.1 + 0.75 * classes, 3.6, 11))
    figure, panel = new_figure(side + 1.2, side)
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if classes <= LARGEST_ANNOTATED:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.6 else "black"
            text = f"{count:,}\n{shares[row, column]:.0%}"
            panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
        short = [short_name(name) for name in names]
        panel.set_xticks(range(classes), short, rotation=0 if max(map(len, short)) < 8 else 30, ha="center")
        panel.set_yticks(range(classes), short)
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
        panel.step(recall, precision, where="pre", color=colour, linestyle=style, label=legend, linewidth=1.6)
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


@dataclass(frozen=True)
class Attention:
    """The attention of one text."""

    tokens: list[str]
    words: list[str]
    word_of: np.ndarray  # int [tokens]; the word of each token
    weights: np.ndarray  # float32 [layers, heads, queries, keys]
    rolled: np.ndarray  # float64 [words]; the rollout from the first token, in all 1


def draw_attention(
    classifier: Classifier, evaluation: Evaluation, folder: Path, chosen: Sequence[int] | None = None
) -> None:
    """attention_heads_ID.png and attention_words_ID.png of these rows; a line says why where they cannot be drawn.

    By default they are of the most confident errors of readable length, or of the shortest texts.
    """
    rows, order = evaluation.rows, evaluation.errors_first
    lengths = rows.documents.lengths
    readable = lengths[order] <= max(READABLE_TOKENS, np.sort(lengths)[: 2 * EXAMPLES].max())
    for row in order[readable][:EXAMPLES].tolist() if chosen is None else chosen:
        attention = attention_of(classifier, rows, row)
        if isinstance(attention, str):
            print(f"note        the attention of {classifier.name} is not drawn: {attention}")
            return
        (example,) = examples_of(
            rows.task_type, [row], rows.ids, rows.labels, evaluation.outputs, rows.names, rows.texts
        )
        sure = f" ({example['probability']:.1%})" if "probability" in example else ""
        title = f"id {example['id']}: actual {example['actual']}, predicted {example['predicted']}{sure}"
        name = "".join(c if c.isalnum() else "_" for c in str(rows.ids[row]))[:40]
        _draw_heads(attention, title, folder / f"attention_heads_{name}.png")
        _draw_words(attention, title, folder / f"attention_words_{name}.png")


@torch.no_grad()
def attention_of(classifier: Classifier, rows: Rows, row: int) -> Attention | str:
    """The attention of one text, or why it cannot be drawn."""
    start, stop = (int(bound) for bound in rows.documents.starts[row : row + 2])
    ids = rows.documents.input_ids[start:stop].astype(np.int64)
    tokens = torch.from_numpy(ids)[None].to(classifier.device)
    model = base_model_of(classifier.model)
    inputs = {"input_ids": tokens}
    if FIRST_TYPE in rows.documents.columns and takes_token_types(model):
        inputs["token_type_ids"] = (torch.arange(len(ids)) >= int(rows.documents.columns[FIRST_TYPE][row])).long()[None]
        inputs["token_type_ids"] = inputs["token_type_ids"].to(tokens.device)
    layers = _weights_of(model, inputs)
    if isinstance(layers, str):
        return layers
    weights = torch.cat(layers).float().cpu().numpy()
    if len(ids) > 1 and not np.triu(weights[0, 0], 1).any():
        return "its first token, from which it would be drawn, sees no other token"
    words, word_of = words_of(classifier.tokenizer, ids.tolist())
    rolled = np.bincount(word_of, rollout(weights)[0], len(words))
    return Attention(classifier.tokenizer.convert_ids_to_tokens(ids.tolist()), words, word_of, weights, rolled)


def _weights_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor] | str:
    """The weights of each layer, [1, heads, tokens, tokens], for one text; else what is returned in their place."""
    before = implementation_of(model.config)
    try:
        with quiet_libraries():
            model.set_attn_implementation("eager")
            whole = torch.ones_like(inputs["input_ids"])
            output = model.stock_forward(**inputs, attention_mask=whole, output_attentions=True, return_dict=True)
    except Exception as error:  # what a model of transformers raises that has no such weights
        return f"the model fails when asked for its weights ({first_line(error)})"
    finally:
        model.set_attn_implementation(before)
    layers: list[Any] = list(getattr(output, "attentions", None) or ())
    if not layers:
        return "the model returns no attention weights"
    count = inputs["input_ids"].shape[1]
    for layer in layers:
        if not isinstance(layer, torch.Tensor) or layer.ndim != 4 or layer.shape[-2:] != (count, count):
            shape = list(layer.shape) if isinstance(layer, torch.Tensor) else type(layer).__name__
            return f"its weights are not tokens by tokens in every layer ({shape} for {count} tokens)"
        if layer.shape != layers[0].shape:
            return "its layers have different numbers of heads"
    return layers


def rollout(weights: np.ndarray) -> np.ndarray:
    """The shares of tokens in tokens: float64 [tokens, tokens], rows sum to 1; from [layers, heads, tokens, tokens].

    In attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928) half of a token's state in each layer is its own and
    half comes by the mean head, and the layers are multiplied. It shows where information can come from, not why the
    class is predicted.
    """
    shares = np.eye(weights.shape[-1])
    for layer in weights.astype(np.float64).mean(axis=1):
        mixed = (layer + np.eye(len(layer))) / 2
        shares = mixed / mixed.sum(axis=1, keepdims=True) @ shares
    return shares


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """The words of tokens, and the word of each token: a token continues a word where decoding puts no space."""
    special = set(tokenizer.all_special_ids)
    words: list[str] = []
    word_of = []
    for place, token in enumerate(ids):
        text = tokenizer.decode([token])
        if place == 0 or special & {token, ids[place - 1]} or _begins_with_space(tokenizer, ids[place - 1], token):
            words.append(text)
        else:
            words[-1] += text.removeprefix("##")
        word_of.append(len(words) - 1)
    return [word.strip() or word for word in words], np.array(word_of)


def _begins_with_space(tokenizer: Any, previous: int, token: int) -> bool:
    """Whether a token is decoded with a space at its start, or as nothing, alone or after the previous one."""
    alone = tokenizer.decode([token])
    after = tokenizer.decode([previous, token])[len(tokenizer.decode([previous])) :]
    return alone[:1] in (" ", "") or after[:1].isspace()


def _draw_heads(attention: Attention, title: str, file: Path) -> None:
    layers, heads, count, _ = attention.weights.shape
    rows, columns = min(layers, LARGEST_GRID), min(heads, LARGEST_GRID)
    size = min(1.5, 12 / columns)
    width, height = max(size * columns, 4.5) + 0.4, size * rows + 0.9
    figure, panels = new_figure(width, height, rows, columns, squeeze=False)
    for (layer, head), panel in np.ndenumerate(panels):
        panel.imshow(np.sqrt(attention.weights[layer, head]), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        if layer == 0:
            panel.set_title(f"head {head + 1}", fontsize=8)
        if head == 0:
            panel.set_ylabel(f"layer {layer + 1}", fontsize=8)
    key = f"rows attend to columns; {count} tokens; shaded by the square root of the weight"
    figure.suptitle(f"{title}\n{key}", fontsize=9)
    text = [f"Attention of {layers} layers with {heads} heads over {count} tokens. {title}."]
    for layer, of_first in enumerate(attention.weights[:, :, 0], start=1):
        most = enumerate(of_first.argmax(axis=1))
        of_heads = ", ".join(f"head {h + 1} {attention.tokens[t]} ({of_first[h, t]:.0%})" for h, t in most)
        text.append(f"Layer {layer}, largest attention of the first token: {of_heads}.")
    save_plot(figure, file, text)


def _draw_words(attention: Attention, title: str, file: Path) -> None:
    """The text, each word shaded by its share in the rollout."""
    words = [_mono(word) for word in attention.words]
    places: list[tuple[int, int]] = []  # line and column of each word
    line = column = 0
    for word in words:
        if column and column + len(word) + 1 > LINE_CHARACTERS:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(word) + 1
    figure, panel = new_figure(7.2, 0.75 + 0.26 * (line + 1))
    panel.set_axis_off()
    alphas = 0.85 * attention.rolled / max(float(attention.rolled.max()), 1e-9)
    for word, (row, column), alpha in zip(words, places, alphas.tolist(), strict=True):
        box = {"facecolor": COLOURS[5], "alpha": alpha, "pad": 1.2, "linewidth": 0}
        style: dict[str, Any] = {"family": "monospace", "fontsize": 10.5, "va": "center", "bbox": box}
        x, y = column / LINE_CHARACTERS, 1 - (row + 0.5) / (line + 1)
        panel.text(x, y, word, transform=panel.transAxes, **style)
    panel.set_title(f"{title}\nattention rollout from the first token over words", loc="left", fontsize=9)
    order = np.argsort(-attention.rolled, kind="stable")[:LISTED_WORDS]
    shares = ", ".join(f"{attention.words[w]} {attention.rolled[w]:.1%}" for w in order)
    save_plot(figure, file, [f"Attention rollout over {len(words)} words. {title}.", f"Largest: {shares}."])


def _mono(word: str) -> str:
    """A word as it is drawn: with dollars escaped, which matplotlib takes for a formula, and cut where very long."""
    return word.replace("$", r"\$") if len(word) <= LINE_CHARACTERS // 2 else word[: LINE_CHARACTERS // 2 - 1] + "…"
