"""Where a classifier looked: attention of chosen texts, head by head, and rolled out from the head's token to words.

The packed kernels keep no weights, so the chosen texts are run once more, one by one, through transformers' eager
attention. Rolled out (Abnar and Zuidema 2020, arXiv:2005.00928) means: in each layer half of what a token holds is its
own and half comes by the mean head, and the layers are multiplied. It says where information can have come from, not
why the class was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotune.evaluation.classification.examples import worth_reading
from isotune.evaluation.classification.models import Classifier
from isotune.evaluation.classification.plots import COLOURS, new_figure, save_picture
from isotune.evaluation.classification.result import Evaluation, Rows
from isotune.io.errors import UserError

EXAMPLES, READABLE_TOKENS = 3, 40
LARGEST_GRID = 12  # layers and heads drawn
WORDS_SAID, LINE_CHARACTERS = 15, 76


@dataclass(frozen=True)
class Attention:
    """Of one text: `weights` is float32 [layers, heads, tokens, tokens], a row a token that looks; `words` its words.

    Attributes:
        word_of: int [tokens]; the word that each token belongs to.
        rolled: float64 [words]; the share of each word in what the head reads, in all 1.
    """

    tokens: list[str]
    words: list[str]
    word_of: np.ndarray
    weights: np.ndarray
    rolled: np.ndarray


def draw_attention(classifier: Classifier, done: Evaluation, folder: Path, rows: Sequence[int]) -> list[Path]:
    """attention_heads_ID.png and attention_words_ID.png of these rows; nothing where the model gives no weights."""
    pictures: list[Path] = []
    for row in rows:
        found = attention_of(classifier, done.rows, row)
        if found is None:
            print(f"note        {classifier.name} gives no attention weights: they are not drawn")
            return pictures
        chosen = int(done.probabilities[row].argmax())
        names = done.rows.names
        title = (
            f"id {done.rows.ids[row]}: actual {names[done.rows.labels[row]]}, predicted {names[chosen]} "
            f"({done.probabilities[row, chosen]:.1%})"
        )
        name = "".join(c if c.isalnum() else "_" for c in str(done.rows.ids[row]))[:40]
        pictures.append(_draw_heads(found, title, folder / f"attention_heads_{name}.png"))
        pictures.append(_draw_words(found, title, folder / f"attention_words_{name}.png"))
    return pictures


def chosen_rows(done: Evaluation, ids: Sequence[str] | None) -> list[int]:
    """The rows of these ids; else the most confident errors of readable length, or the shortest texts.

    Raises:
        UserError: an id that there is not.
    """
    if ids is not None:
        places = {str(one): row for row, one in enumerate(done.rows.ids)}
        unknown = [one for one in ids if one not in places]
        if unknown:
            raise UserError(f"--attention_ids: no row has the id {unknown[0]!r}")
        return [places[one] for one in ids]
    lengths = done.rows.documents.lengths
    order = worth_reading(done.rows.labels, done.probabilities)
    longest = max(READABLE_TOKENS, np.sort(lengths)[: 2 * EXAMPLES].max())
    return order[lengths[order] <= longest][:EXAMPLES].tolist()


@torch.no_grad()
def attention_of(classifier: Classifier, rows: Rows, row: int) -> Attention | None:
    """The attention of one text; None where the model gives no weights."""
    start, stop = (int(bound) for bound in rows.documents.starts[row : row + 2])
    ids = rows.documents.input_ids[start:stop].astype(np.int64)
    model = classifier.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    try:
        inner.set_attn_implementation("eager")
        device = next(inner.parameters()).device
        found = inner.stock_forward(
            torch.from_numpy(ids)[None].to(device),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=device),
            output_attentions=True,
            return_dict=True,
        )
    finally:
        inner.set_attn_implementation(before)
    layers = getattr(found, "attentions", None)
    if not layers:
        return None
    weights = torch.cat(list(layers)).float().cpu().numpy()
    words, word_of = words_of(classifier.tokenizer, ids.tolist())
    rolled = np.bincount(word_of, rollout(weights)[0], len(words))
    return Attention(classifier.tokenizer.convert_ids_to_tokens(ids.tolist()), words, word_of, weights, rolled)


def rollout(weights: np.ndarray) -> np.ndarray:
    """What each token holds of each: float64 [tokens, tokens], rows sum to 1; from [layers, heads, tokens, tokens]."""
    held = np.eye(weights.shape[-1])
    for layer in weights.astype(np.float64).mean(axis=1):
        mixed = (layer + np.eye(len(layer))) / 2
        held = mixed / mixed.sum(axis=1, keepdims=True) @ held
    return held


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """The words of tokens, and the word of each token: a token goes on with a word where decoding puts no space."""
    special = set(tokenizer.all_special_ids)
    words: list[str] = []
    word_of = []
    for place, token in enumerate(ids):
        text = tokenizer.decode([token])
        previous = ids[place - 1] if place else None
        goes_on = (
            previous is not None
            and token not in special
            and previous not in special
            and not any(
                c.isspace() for c in tokenizer.decode([previous, token])[len(tokenizer.decode([previous])) :][:1]
            )
            and text[:1] not in (" ", "")
        )
        if goes_on:
            words[-1] += text.removeprefix("##")
        else:
            words.append(text)
        word_of.append(len(words) - 1)
    return [word.strip() or word for word in words], np.array(word_of)


def _draw_heads(found: Attention, title: str, file: Path) -> Path:
    layers, heads, count, _ = found.weights.shape
    rows, columns = min(layers, LARGEST_GRID), min(heads, LARGEST_GRID)
    figure, panels = _grid_of(rows, columns)
    for layer in range(rows):
        for head in range(columns):
            panel = panels[layer][head]
            panel.imshow(np.sqrt(found.weights[layer, head]), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if layer == 0:
                panel.set_title(f"head {head + 1}", fontsize=8)
            if head == 0:
                panel.set_ylabel(f"layer {layer + 1}", fontsize=8)
    key = f"rows look at columns; {count} tokens; shaded by the square root of the weight"
    figure.suptitle(f"{title}\n{key}", fontsize=9)
    words = [f"Attention of {layers} layers with {heads} heads over {count} tokens. {title}."]
    for layer in range(layers):
        from_head = found.weights[layer, :, 0]
        most = from_head.argmax(axis=1)
        said = ", ".join(f"head {h + 1} {found.tokens[t]} ({from_head[h, t]:.0%})" for h, t in enumerate(most))
        words.append(f"Layer {layer + 1}, what the first token looks at most: {said}.")
    return save_picture(figure, file, words)


def _grid_of(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = min(1.5, 12 / columns)
    figure = Figure(figsize=(max(size * columns, 4.5) + 0.4, size * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_words(found: Attention, title: str, file: Path) -> Path:
    """The text, each word shaded by its share; the darkest is the one with the largest share."""
    lines = _lines(found.words)
    figure, panel = new_figure(7.2, 0.75 + 0.26 * len(lines))
    panel.set_axis_off()
    character, largest = 1 / LINE_CHARACTERS, max(float(found.rolled.max()), 1e-9)
    for line, words in enumerate(lines):
        x = 0.0
        for word in words:
            shade = float(found.rolled[word]) / largest
            box = {"facecolor": COLOURS[5], "alpha": 0.85 * shade, "pad": 1.2, "linewidth": 0}
            style: dict[str, Any] = {"family": "monospace", "fontsize": 10.5, "va": "center", "bbox": box}
            panel.text(x, 1 - (line + 0.5) / len(lines), _mono(found.words[word]), transform=panel.transAxes, **style)
            x += (len(_mono(found.words[word])) + 1) * character
    panel.set_title(f"{title}\nattention rolled out from the first token over words", loc="left", fontsize=9)
    order = np.argsort(-found.rolled, kind="stable")[:WORDS_SAID]
    shares = ", ".join(f"{found.words[w]} {found.rolled[w]:.1%}" for w in order)
    return save_picture(
        figure, file, [f"Attention rolled out over {len(found.words)} words. {title}.", f"Most: {shares}."]
    )


def _lines(words: list[str]) -> list[list[int]]:
    lines: list[list[int]] = [[]]
    used = 0
    for number, word in enumerate(words):
        width = len(_mono(word)) + 1
        if used and used + width > LINE_CHARACTERS:
            lines.append([])
            used = 0
        lines[-1].append(number)
        used += width
    return lines


def _mono(word: str) -> str:
    """What is drawn of a word: dollars would begin a formula, and a very long word a line of its own."""
    return word.replace("$", r"\$") if len(word) <= LINE_CHARACTERS // 2 else word[: LINE_CHARACTERS // 2 - 1] + "…"
