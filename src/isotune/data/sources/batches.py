"""Reads the conversations of a source in batches, so that tokenising and reading can go on side by side."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from isotune.data.sft.conversations import Conversation, TrainOn, parse_text, render_messages
from isotune.data.sources.source import Row, Source
from isotune.io.errors import UserError

BATCH_ROWS = 256
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
    """Read and parse a source, BATCH_ROWS at a time.

    The conversations stand in the column `text_field`; where that is the default and absent, in `messages` or
    `conversations`. A text is in Guanaco's form, a list is messages.

    Raises:
        UserError: no such column, or a row that holds no conversation there; the sentence names the row.
    """
    rows = enumerate(source.rows())
    column = None
    while some := list(islice(rows, BATCH_ROWS)):
        answered: list[tuple[int, Conversation]] = []
        for number, row in some:
            column = column or _conversation_column(row, source, text_field)
            if column not in row:
                raise UserError(f"{source.where(number)} lacks the column {column!r}; it has {', '.join(row)}")
            try:
                conversation = _conversation(row[column], train_on)
            except ValueError as error:
                raise UserError(f"{source.where(number)}, column {column!r}: {error}") from error
            if conversation.answers:
                answered.append((number, conversation))
        conversations = [conversation for _, conversation in answered]
        yield Batch(
            read=len(some),
            rows=np.array([number for number, _ in answered], np.int64),
            conversations=conversations,
            turns_cut=sum(conversation.turns_cut for conversation in conversations),
        )


def _conversation_column(first_row: Row, source: Source, text_field: str) -> str:
    wanted = (text_field, *MESSAGES_COLUMNS) if text_field == TEXT_FIELD else (text_field,)
    for column in wanted:
        if column in first_row:
            return column
    held = ", ".join(first_row) or "of an empty object"
    raise UserError(
        f"{source.name} has the columns {held}, but none called {' or '.join(wanted)}: "
        "name the one that holds the conversations by dataset_text_field"
    )


def _conversation(value: Any, train_on: TrainOn) -> Conversation:
    """A row's conversation in whichever form it stands; ValueError says what is wrong with it."""
    if isinstance(value, str):
        conversation = parse_text(value, train_on)
    elif isinstance(value, list):
        conversation = render_messages(value, train_on)
    else:
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"holds {kind}, neither a text nor a list of messages")
    try:
        conversation.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair at character {error.start}, which is no text") from error
    return conversation
