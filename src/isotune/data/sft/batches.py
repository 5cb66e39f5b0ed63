"""Reads the conversations of a source in batches, so that tokenizing and reading can go on side by side."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from isotune.data.sft.conversations import Conversation, TrainOn, parse_text, render_messages
from isotune.data.sources.source import Row, Source, kind_of_value, surrogate_fault
from isotune.io.errors import UserError

TEXT_FIELD = "text"
MESSAGES_COLUMNS = ("messages", "conversations")


@dataclass(frozen=True)
class Batch:
    """Rows of a source that were read together.

    Attributes:
        read: how many there were.
        rows: int64 [conversations]; the row numbers of those that hold an answer.
        conversations: those.
        turns_cut: turns after their last answers.
    """

    read: int
    rows: np.ndarray
    conversations: list[Conversation]
    turns_cut: int


def read_batches(source: Source, text_field: str, train_on: TrainOn) -> Iterator[Batch]:
    """Read and parse a source, batch by batch.

    The conversations stand in the column `text_field`; where that is the default and absent, in `messages` or
    `conversations`. A text is in Guanaco's form, a list is messages.

    Raises:
        UserError: no such column, or a row that holds no conversation there; the sentence names the row.
    """
    column = None
    for rows in source.batches():
        numbers: list[int] = []
        conversations: list[Conversation] = []
        for number, row in rows:
            column = column or _conversation_column(row, source, text_field)
            if column not in row:
                raise UserError(f"{source.where(number)} lacks the column {column!r}; it has {', '.join(row)}")
            try:
                conversation = _conversation(row[column], train_on)
            except ValueError as error:
                raise UserError(f"{source.where(number)}, column {column!r}: {error}") from error
            if conversation.answers:
                numbers.append(number)
                conversations.append(conversation)
        turns_cut = sum(conversation.turns_cut for conversation in conversations)
        yield Batch(len(rows), np.array(numbers, np.int64), conversations, turns_cut)


def _conversation_column(first_row: Row, source: Source, text_field: str) -> str:
    candidates = (text_field, *MESSAGES_COLUMNS) if text_field == TEXT_FIELD else (text_field,)
    for column in candidates:
        if column in first_row:
            return column
    present = ", ".join(first_row) or "of an empty object"
    raise UserError(
        f"{source.name} has the columns {present}, but none called {' or '.join(candidates)}: "
        "name the one that holds the conversations by dataset_text_field"
    )


def _conversation(value: Any, train_on: TrainOn) -> Conversation:
    """A row's conversation in whichever form it stands; ValueError says what is wrong with it."""
    if isinstance(value, str):
        conversation = parse_text(value, train_on)
    elif isinstance(value, list):
        conversation = render_messages(cast(list[Any], value), train_on)
    else:
        raise ValueError(f"holds {kind_of_value(value)}, neither a text nor a list of messages")
    if fault := surrogate_fault(conversation.text):
        raise ValueError(fault)
    return conversation
