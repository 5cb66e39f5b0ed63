"""Whether a tokenizer's tokens have rows in the embedding of the model that they are for, and rows for new ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isotune.compat.torch import in_float64, one_thread
from isotune.config import RunRecipe
from isotune.io.errors import UserError

ROWS_AT_ONCE = 4096
TOKENS_AT_ONCE = 2**24


def token_count(tokenizer: Any) -> int:
    """The rows that an embedding needs for the tokenizer: its highest token id and one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def embedding_rows(config: Any) -> int | None:
    """The rows of a model's embedding by its configuration; None where that says nothing."""
    return getattr(config.get_text_config(), "vocab_size", None)


def check_tokens(config: Any, tokenizer: Any, model: str, advice: str = "take the model's own tokenizer") -> None:
    """UserError where the tokenizer has tokens that `model` has no row for; more rows than tokens are fine."""
    tokens, rows = token_count(tokenizer), embedding_rows(config)
    if rows is not None and tokens > rows:
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise UserError(
            f"the tokenizer '{name}' has {tokens:,} tokens and the embedding of '{model}' {rows:,} rows: a text with "
            f"one of the last {tokens - rows:,} tokens cannot be read; {advice}"
        )


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> None:
    """Give a tokenizer new tokens, which are never split; UserError for one that it has."""
    for text in texts:
        if not text.strip() or text in tokenizer.get_vocab():
            why = "which is empty" if not text.strip() else "which the tokenizer has"
            raise UserError(f"add_tokens names '{text}', {why}: take it out")
        tokenizer.add_tokens(text)


def new_rows(config: Any, tokenizer: Any, recipe: RunRecipe) -> tuple[int, ...]:
    """The ids of the tokens whose rows a run draws and trains: those of `add_tokens`, and all that have no row yet.

    A token that is added may take a row that the embedding had to spare. UserError where the tokenizer came with more
    tokens than the embedding has rows, and `resize_embeddings` does not ask for more.
    """
    added = {int(tokenizer.convert_tokens_to_ids(text)) for text in recipe.add_tokens or ()}
    tokens, rows = token_count(tokenizer), embedding_rows(config)
    missing = range(tokens if rows is None else rows, tokens)
    if set(missing) - added and not recipe.resize_embeddings:
        advice = "take the model's own tokenizer, or say resize_embeddings: true, which adds rows and trains them"
        check_tokens(config, tokenizer, recipe.model_name_or_path, advice)
    return tuple(sorted(added.union(missing)))


def without_text(tokenizer: Any, texts: Sequence[str], input_ids: np.ndarray) -> list[str]:
    """The texts that are a token each and stand in no document: `input_ids` are int32 [tokens]."""
    ids, seen = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in texts}, set[int]()
    for start in range(0, len(input_ids), TOKENS_AT_ONCE):
        if seen.issuperset(ids.values()):
            break
        seen.update(np.unique(input_ids[start : start + TOKENS_AT_ONCE]).tolist())
    return [text for text, own in ids.items() if own not in seen]


@torch.no_grad()
def grow_embeddings(model: Any, rows: Sequence[int]) -> None:
    """Give a model's embedding, and its head, these rows: each begins as the mean of those that were there before.

    In fp64 and one thread, so that it is the same on every process. The configuration follows.
    """
    if not rows:
        return
    before = model.get_input_embeddings().weight.shape[0]
    if rows[-1] >= before:
        model.resize_token_embeddings(rows[-1] + 1, mean_resizing=False)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    tensors = [tensor for layer in layers for tensor in (layer.weight, getattr(layer, "bias", None))]
    index = torch.from_numpy(np.setdiff1d(np.arange(before), rows))
    for tensor in {id(tensor): tensor for tensor in tensors if tensor is not None and not tensor.is_meta}.values():
        known = index.to(tensor.device)
        with one_thread():
            total = in_float64(torch.zeros(tensor.shape[1:], device=tensor.device))
            for start in range(0, len(known), ROWS_AT_ONCE):
                total += in_float64(tensor[known[start : start + ROWS_AT_ONCE]]).sum(dim=0)
        tensor[list(rows)] = (total / len(known)).to(tensor.dtype).to(tensor.device)
