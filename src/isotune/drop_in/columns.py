"""Columns of a dataset that the library's trainer would hand to the model, or change, and a schedule does not."""

import inspect
from collections.abc import Collection
from typing import Any

from transformers import DataCollatorForLanguageModeling

from isotune.data.datasets import CARRIED_COLUMNS
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


def collator_note(collator: Any, row: Collection[str]) -> str | None:
    """What a causal collator of the library would make of the labels, and is not done here; None where nothing is."""
    if not isinstance(collator, DataCollatorForLanguageModeling):
        return None
    if "labels" in row:
        return "the labels of the dataset are learnt, which DataCollatorForLanguageModeling would replace by input_ids"
    tokenizer = collator.tokenizer
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
    tokenizer = collator.tokenizer
    return None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
