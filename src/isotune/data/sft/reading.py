"""Rows of a source as conversations ready to be tokenised, batch by batch, so that reading and tokenizing overlap."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from isotune.config.recipes import TrainOn
from isotune.data.sft.conversations import (
    ASSISTANT_HEADER,
    HUMAN_HEADER,
    Conversation,
    everything,
    header_start,
    parse_text,
    turns_of,
    unknown_header,
)
from isotune.data.sft.forms import (
    INPUT_IDS,
    INSTRUCTION,
    MESSAGES_COLUMNS,
    QUESTIONS,
    TEXT_FIELD,
    Content,
    NamedColumns,
    TokenRow,
    as_messages,
    check_media,
    form_of,
    left_below,
    left_beside,
    with_usual_names,
)
from isotune.data.sft.messages import SYSTEM, USER, Example, read_message
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.data.sources.source import Row, Source, is_null, surrogate_fault
from isotune.io.errors import UserError, shown


@dataclass(frozen=True)
class Batch:
    """Rows of a source that were read together, `read` of them; only what holds something to learn is here."""

    read: int
    rows: np.ndarray  # int64 [conversations, or tokenised rows]; a row may have several conversations
    conversations: list[Conversation]
    tokenised: list[TokenRow] = field(default_factory=list[TokenRow])


def read_contents(
    source: Source, named: NamedColumns, guesses: list[str] | None = None, *, in_words: bool = False
) -> Iterator[list[tuple[int, Content]]]:
    """What the rows of a source hold, in batches, each row with its number counted from 0; UserError names a bad row.

    `guesses` takes the sentences about forms that nobody named, and about what is not read beside them, each once.
    `in_words`: tokens are read only of a row that has nothing else.
    """
    for rows in source.batches():
        contents: list[tuple[int, Content]] = []
        for number, row in rows:
            given = {name: value for name, value in row.items() if not is_null(value)}
            form = form_of(tuple(name for name in given if name != INPUT_IDS), named) if in_words else None
            form = form or form_of(tuple(given), named)
            if form is None:
                raise _unknown_form(source, number, row, named)
            try:
                check_media(given, named.wanted.values())
                content = form.read(with_usual_names(given))
            except ValueError as error:
                raise UserError(f"{source.where(number)}, {error}") from error
            contents.append((number, content))
            if guesses is not None:
                for note in (form.note, left_beside(given, content), left_below(given, named)):
                    if note is not None and note not in guesses:
                        guesses.append(note)
        yield contents


def _unknown_form(source: Source, number: int, row: Row, named: NamedColumns) -> UserError:
    absent = next(((key, column) for key, column in named.wanted.items() if is_null(row.get(column))), None)
    key, column = absent or ("dataset_text_field", TEXT_FIELD)
    candidates = (column,) if absent else (TEXT_FIELD, *MESSAGES_COLUMNS[:2])
    whole = form_of(tuple(row), named)
    ends = (whole.columns[0], whole.columns[-1]) if whole else candidates  # what stands between may be null
    null = next((name for name in ends if name in row and is_null(row[name])), None)
    if null:
        kind = "not a list of whole numbers" if null == INPUT_IDS else "neither a text nor a list of messages"
        return UserError(f"{source.where(number)}, column {null!r}: holds null, {kind}")
    if not absent and {"chosen", "rejected"} <= row.keys():
        return UserError(f"{source.where(number)} is a preference: {_way_to_chosen(row)}")
    if not absent and not number:
        column, key = "' or '".join(candidates), "dataset_text_field, or by dataset_prompt_field and _completion_field"
    return source.lacks(number, row, column, key)


def _way_to_chosen(row: Row) -> str:
    """The keys that train on the chosen answers of a preference, with their questions."""
    chosen = as_messages(row["chosen"])
    first = cast(list[Any], chosen)[:1] if isinstance(chosen, list) else []
    is_whole = isinstance(chosen, str) and header_start(chosen) is not None
    if first:
        try:
            is_whole = read_message(first[0], 1)[0]["role"] in (SYSTEM, USER)
        except ValueError:
            is_whole = False
    question = next((name for name in (*QUESTIONS, INSTRUCTION) if not is_null(row.get(name))), None)
    if question is None and first and not is_whole:
        return (
            "'chosen' has no question, and no column is known as one: name it by dataset_prompt_field, with "
            "dataset_completion_field: chosen"
        )
    way = f"dataset_prompt_field: {question} with dataset_completion_field: chosen"
    return f"{'dataset_text_field: chosen' if is_whole or question is None else way} trains on the chosen answers alone"


def read_batches(
    source: Source,
    named: NamedColumns,
    train_on: TrainOn,
    encoder: ConversationEncoder,
    *,
    seen: list[str] | None = None,
    guesses: list[str] | None = None,
) -> Iterator[Batch]:
    """Read a source, and write its conversations in the encoder's form; UserError names a row that cannot be.

    A row that is tokenised beside others that are not is refused. `seen` takes the beginning of the first text without
    a header: what to show where nothing can be trained on; `guesses` is that of `read_contents`.
    """
    first: type | None = None
    for contents in read_contents(source, named, guesses):
        numbers: list[int] = []
        conversations: list[Conversation] = []
        tokenised: list[TokenRow] = []
        for number, content in contents:
            first = first or type(content)
            if (type(content) is TokenRow) != (first is TokenRow):
                raise UserError(f"{source.where(number)} has another form than row 1: tokens beside texts")
            if isinstance(content, TokenRow):
                if (len(content.input_ids) and content.input_ids.max() >= encoder.vocabulary) or content.input_ids.min(
                    initial=0
                ) < 0:
                    raise UserError(
                        f"{source.where(number)}, column 'input_ids': holds a token outside the tokenizer's "
                        f"{encoder.vocabulary}: it was tokenised by another"
                    )
                if content.supervised[1:].any():
                    numbers.append(number)
                    tokenised.append(content)
                continue
            if seen is not None and not seen and (unlike := without_header(number, content)):
                seen.append(unlike)
            if guesses is not None and isinstance(content, str) and train_on != "everything":
                _note_header(guesses, source, number, content)
            try:
                found = _conversations(content, train_on, encoder)
                fault = next(filter(None, (surrogate_fault(conversation.text) for conversation in found)), None)
                if fault:
                    raise ValueError(fault)
            except ValueError as error:
                raise UserError(f"{source.where(number)}{_column_of(content, named.text)}: {error}") from error
            numbers += [number] * len(found)
            conversations += found
        yield Batch(len(contents), np.array(numbers, np.int64), conversations, tokenised)


def without_header(number: int, content: Content) -> str | None:
    """How a text without a header begins; None for any other content of a row, counted from 0."""
    if not isinstance(content, str) or header_start(content) is not None:
        return None
    return f"a text has the headers {HUMAN_HEADER} and {ASSISTANT_HEADER}, and row {number + 1} begins {shown(content)}"


def _note_header(notes: list[str], source: Source, number: int, text: str) -> None:
    """Note a header of another name, each once: the answer before it goes on behind it."""
    header = unknown_header(text)
    if header is not None and not any(f" {header!r} " in note for note in notes):
        notes.append(
            f"{source.where(number)} has {header!r} in its text, which is no header and belongs to the turn before it: "
            f"those of a text are {HUMAN_HEADER} and {ASSISTANT_HEADER}"
        )


def _column_of(content: Content, text_field: str) -> str:
    return f", column {text_field!r}" if isinstance(content, str) else ""


def _conversations(content: Example | str, train_on: TrainOn, encoder: ConversationEncoder) -> list[Conversation]:
    if isinstance(content, Example):
        return encoder.conversations(content, train_on)
    if train_on == "everything":
        found = everything(content)
    elif encoder.template is None:
        found = parse_text(content, train_on)
    else:
        return encoder.conversations(example_of_text(content), train_on)
    return [found] if found.answers else []


def example_of_text(text: str) -> Example:
    """A text in Guanaco's form as a conversation of messages, as every form asks for them."""
    turns = turns_of(text)
    return Example(tuple(turns), (True,) * len(turns))
