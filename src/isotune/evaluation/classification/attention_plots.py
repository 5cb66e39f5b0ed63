"""The attention of a classifier in a few texts: of every head, and rolled out over the words.

The packed kernels return no attention weights, so these texts run once more, one by one, with transformers' eager
attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of as implementation_of
from isotune.data.documents import FIRST_TYPE
from isotune.evaluation.classification.evaluate import Evaluation, Rows
from isotune.evaluation.classification.figures import COLOURS, new_figure, save_plot
from isotune.evaluation.models import Classifier
from isotune.io.errors import first_line
from isotune.models.classifier import takes_token_types
from isotune.models.log_control import quiet_libraries

EXAMPLES, READABLE_TOKENS = 3, 40  # texts whose attention is drawn where none is chosen
LARGEST_GRID = 12  # layers and heads drawn
TOKEN_INCHES, TOKEN_FONT, LARGEST_INCHES = 0.1, 6, 24.0  # of a token's name on an axis; of all heads side by side
LISTED_WORDS, LINE_CHARACTERS = 15, 76


@dataclass(frozen=True)
class Attention:
    """The attention of one text."""

    tokens: list[str]
    words: list[str]
    weights: np.ndarray  # float32 [layers, heads, queries, keys]
    rolled: np.ndarray  # float64 [words]; the rollout from the first token, in all 1
    special: np.ndarray  # bool [words]; those that are special tokens


def draw_attention(
    classifier: Classifier, evaluation: Evaluation, folder: Path, chosen: Sequence[int] | None = None
) -> None:
    """attention_heads_ID.png and attention_words_ID.png of these rows; a line says why where they cannot be drawn.

    By default they are of the most confident errors of readable length.
    """
    rows, order = evaluation.rows, evaluation.errors_first
    lengths = rows.documents.lengths
    readable: list[int] = order[lengths[order] <= READABLE_TOKENS][:EXAMPLES].tolist()
    if chosen is None and not readable:
        print(f"note        no attention is drawn: every text has over {READABLE_TOKENS} tokens (--attention_ids)")
    for row in readable if chosen is None else chosen:
        attention = attention_of(classifier, rows, row)
        if isinstance(attention, str):
            print(f"note        the attention of {classifier.name} is not drawn: {attention}")
            return
        (example,) = evaluation.examples_of([row])
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
    special = np.isin(ids, classifier.tokenizer.all_special_ids)
    of_words = np.bincount(word_of, special, len(words)) > 0  # a special token is a word by itself
    names = classifier.tokenizer.convert_ids_to_tokens(ids.tolist())
    return Attention(names, words, weights, rolled, of_words)


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
    """A panel for each head, layer by layer; the tokens are on the outer axes where they are readable."""
    from matplotlib.colors import PowerNorm

    layers, heads, count, _ = attention.weights.shape
    rows, columns = min(layers, LARGEST_GRID), min(heads, LARGEST_GRID)
    size, labelled = min(1.5, 12 / columns), TOKEN_INCHES * count
    are_readable = labelled * columns <= LARGEST_INCHES
    size = max(size, labelled) if are_readable else size
    width, height = max(size * columns, 4.5) + 1.6, size * rows + 1.5
    figure, panels = new_figure(width, height, rows, columns, squeeze=False)
    shades, image = PowerNorm(0.5, 0, 1), None
    tokens = [_mono(token) for token in attention.tokens]
    for (layer, head), panel in np.ndenumerate(panels):
        image = panel.imshow(attention.weights[layer, head], cmap="Blues", norm=shades, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        if are_readable and layer == rows - 1:
            panel.set_xticks(range(count), tokens, rotation=90, fontsize=TOKEN_FONT)
        if are_readable and head == 0:
            panel.set_yticks(range(count), tokens, fontsize=TOKEN_FONT)
        if layer == 0:
            panel.set_title(f"head {head + 1}", fontsize=8)
        if head == 0:
            panel.set_ylabel(f"layer {layer + 1}", fontsize=8)
    figure.colorbar(image, ax=panels, label="weight", fraction=0.03)
    key = f"rows attend to columns; {count} tokens"
    figure.suptitle(f"{title}\n{key}", fontsize=9)
    text = [f"Attention of {layers} layers with {heads} heads over {count} tokens. {title}."]
    for layer, of_first in enumerate(attention.weights[:, :, 0], start=1):
        most = enumerate(of_first.argmax(axis=1))
        of_heads = ", ".join(f"head {h + 1} {attention.tokens[t]} ({of_first[h, t]:.0%})" for h, t in most)
        text.append(f"Layer {layer}, largest attention of the first token: {of_heads}.")
    save_plot(figure, file, text)


def _draw_words(attention: Attention, title: str, file: Path) -> None:
    """The text, each word shaded by its share in the rollout, relative to the largest; special tokens in grey."""
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
    of_words = np.where(attention.special, 0, attention.rolled)
    alphas = 0.85 * of_words / max(float(of_words.max()), 1e-9)
    for word, (row, column), alpha, is_special in zip(words, places, alphas, attention.special, strict=True):
        box = {"facecolor": COLOURS[5], "alpha": float(alpha), "pad": 1.2, "linewidth": 0}
        style: dict[str, Any] = {"family": "monospace", "fontsize": 10.5, "va": "center", "bbox": box}
        style["color"] = "#777777" if is_special else "black"
        x, y = column / LINE_CHARACTERS, 1 - (row + 0.5) / (line + 1)
        panel.text(x, y, word, transform=panel.transAxes, **style)
    panel.set_title(f"{title}\nattention rollout from the first token over words", loc="left", fontsize=9)
    order = [w for w in np.argsort(-attention.rolled, kind="stable") if not attention.special[w]][:LISTED_WORDS]
    shares = ", ".join(f"{attention.words[w]} {attention.rolled[w]:.1%}" for w in order)
    of_special = float(attention.rolled[attention.special].sum())
    lines = [f"Attention rollout over {len(words)} words. {title}.", f"Largest: {shares or 'none'}."]
    save_plot(figure, file, [*lines, f"Special tokens: {of_special:.1%}."])


def _mono(word: str) -> str:
    """A word as it is drawn: with dollars escaped, which matplotlib takes for a formula, and cut where very long."""
    return word.replace("$", r"\$") if len(word) <= LINE_CHARACTERS // 2 else word[: LINE_CHARACTERS // 2 - 1] + "…"
