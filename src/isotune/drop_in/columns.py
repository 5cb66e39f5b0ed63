"""Columns of a dataset: what no document carries, what is no label or token of the model, what a collator changes."""

import inspect
from collections.abc import Collection
from typing import Any

import numpy as np
from transformers import DataCollatorForLanguageModeling

from isotune.data.datasets import CARRIED_COLUMNS
from isotune.data.documents import Documents
from isotune.io.errors import UserError


def check_columns(base: Any, row: Collection[str], label_columns: Collection[str]) -> None:
    """UserError for a column of a row that the model's forward would be given, and that no document carries."""
    taken = inspect.signature(getattr(base, "stock_forward", base.forward)).parameters
    lost = next((name for name in row if name in taken and name not in (*CARRIED_COLUMNS, *label_columns)), None)
    if lost is not None:
        raise UserError(
            f"{type(base).__name__}.forward would be given the column {lost!r} of the dataset, which no document "
            "carries: remove the column, or use the library's own trainer"
        )


def check_targets(config: Any, targets: np.ndarray, column: str) -> None:
    """UserError for targets of a classifier, [rows, ...], that the library's loss has no meaning for."""
    if config.num_labels < 2 or config.problem_type == "regression":
        return
    several = config.problem_type == "multi_label_classification"
    if several or (config.problem_type is None and targets[0].size > 1):
        if targets.dtype.kind != "f" or targets.shape[1:] != (config.num_labels,):
            raise UserError(
                f"row 1 of the dataset has {targets[0].tolist()} in {column!r}: labels of several classes are floats, "
                f"1.0 and 0.0, one for each of the {config.num_labels} of the model"
            )
        return
    if targets.dtype.kind != "i" or targets[0].size > 1:
        raise UserError(
            f"row 1 of the dataset has {targets[0].tolist()} in {column!r}: a class is a whole number from 0, and "
            "numbers are learnt by a model with num_labels=1"
        )
    if targets.max() >= config.num_labels:
        row = int(targets.reshape(-1).argmax())
        raise UserError(
            f"row {row + 1} of the dataset has the class {targets.max()} in {column!r}, and the model has "
            f"{config.num_labels}, counted from 0: load it with num_labels={targets.max() + 1}"
        )


def check_tokens(embeddings: Any, documents: Documents) -> None:
    """UserError for a token that the model has no embedding of."""
    size, ids = getattr(embeddings, "num_embeddings", None), documents.input_ids
    if size is None or 0 <= ids.min() <= ids.max() < size:
        return
    place = int(np.argmax((ids < 0) | (ids >= size)))
    row = documents.ids[np.searchsorted(documents.starts, place, "right") - 1]
    raise UserError(
        f"row {row + 1} of the dataset has the token {ids[place]}, and the model has embeddings of {size}: "
        "model.resize_token_embeddings(len(tokenizer)) makes those of added tokens"
    )


def collator_note(collator: Any, row: Collection[str]) -> str | None:
    """What a causal collator of the library would make of the labels, and is not done here; None where nothing is."""
    if not isinstance(collator, DataCollatorForLanguageModeling):
        return None
    if "labels" in row:
        return "the labels of the dataset are learnt, which DataCollatorForLanguageModeling would replace by input_ids"
    tokenizer: Any = collator.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        return (
            f"every {tokenizer.eos_token} is learnt, which DataCollatorForLanguageModeling would mask, because it pads "
            "by the same token"
        )
    return None


def masked_token(collator: Any) -> int | None:
    """The token that a causal collator of the library never learns: the one that it pads by.

    Where that also ends a text it is learnt here, which `collator_note` says.
    """
    if not isinstance(collator, DataCollatorForLanguageModeling):
        return None
    tokenizer: Any = collator.tokenizer
    return None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
