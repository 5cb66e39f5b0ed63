"""Plots of a classifier's attention on a few texts: each head, and the attention rollout from the first token to words.

The packed kernels return no weights, so these texts run once more, one by one, with transformers' eager attention. In
attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928) half of a token's state in each layer is its own and half
comes by the mean head, and the layers are multiplied. It shows where information can come from, not why the class is
predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of as implementation_of
from isotune.evaluation.classification.evaluate import Evaluation, Rows
from isotune.evaluation.classification.plots import COLOURS, new_figure, save_plot
from isotune.evaluation.models import Classifier

EXAMPLES, READABLE_TOKENS = 3, 40
LARGEST_GRID = 12  # layers and heads drawn
LISTED_WORDS, LINE_CHARACTERS = 15, 76


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
    """attention_heads_ID.png and attention_words_ID.png of these rows; nothing where the model returns no weights.

    By default they are of the most confident errors of readable length, or of the shortest texts.
    """
    rows = evaluation.rows
    for row in _readable_errors(evaluation) if chosen is None else chosen:
        attention = attention_of(classifier, rows, row)
        if attention is None:
            print(f"note        {classifier.name} returns no attention weights: they are not drawn")
            return
        probabilities = evaluation.probabilities[row]
        predicted = int(probabilities.argmax())
        title = (
            f"id {rows.ids[row]}: actual {rows.names[rows.labels[row]]}, "
            f"predicted {rows.names[predicted]} ({probabilities[predicted]:.1%})"
        )
        name = "".join(c if c.isalnum() else "_" for c in str(rows.ids[row]))[:40]
        _draw_heads(attention, title, folder / f"attention_heads_{name}.png")
        _draw_words(attention, title, folder / f"attention_words_{name}.png")


def _readable_errors(evaluation: Evaluation) -> list[int]:
    lengths, order = evaluation.rows.documents.lengths, evaluation.errors_first
    longest = max(READABLE_TOKENS, np.sort(lengths)[: 2 * EXAMPLES].max())
    return order[lengths[order] <= longest][:EXAMPLES].tolist()


@torch.no_grad()
def attention_of(classifier: Classifier, rows: Rows, row: int) -> Attention | None:
    """The attention of one text; None where the model returns no weights."""
    start, stop = (int(bound) for bound in rows.documents.starts[row : row + 2])
    ids = rows.documents.input_ids[start:stop].astype(np.int64)
    inner = base_model_of(classifier.model)
    before = implementation_of(inner.config)
    try:
        inner.set_attn_implementation("eager")
        tokens = torch.from_numpy(ids)[None].to(classifier.device)
        output = inner.stock_forward(
            tokens, attention_mask=torch.ones_like(tokens), output_attentions=True, return_dict=True
        )
    finally:
        inner.set_attn_implementation(before)
    layers = getattr(output, "attentions", None)
    if not layers:
        return None
    weights = torch.cat(list(layers)).float().cpu().numpy()
    words, word_of = words_of(classifier.tokenizer, ids.tolist())
    rolled = np.bincount(word_of, rollout(weights)[0], len(words))
    return Attention(classifier.tokenizer.convert_ids_to_tokens(ids.tolist()), words, word_of, weights, rolled)


def rollout(weights: np.ndarray) -> np.ndarray:
    """The shares of tokens in tokens: float64 [tokens, tokens], rows sum to 1; from [layers, heads, tokens, tokens]."""
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
