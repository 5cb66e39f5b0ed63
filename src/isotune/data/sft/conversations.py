"""Conversations as one text with the spans of its answers, so the supervised mask never guesses where a turn ends.

They are read from a source in batches, so that tokenizing and reading can go on side by side.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from isotune.config.recipes import TrainOn
from isotune.data.sources.source import Row, Source, kind_of_value, surrogate_fault
from isotune.io.errors import UserError

TEXT_FIELD = "text"
MESSAGES_COLUMNS = ("messages", "conversations")
HUMAN_HEADER = "### Human:"
ASSISTANT_HEADER = "### Assistant:"
ROLE_HEADERS = {
    "system": "### System:",
    "user": HUMAN_HEADER,
    "human": HUMAN_HEADER,
    "assistant": ASSISTANT_HEADER,
    "gpt": ASSISTANT_HEADER,
}
# Real data has headers after a line end, after a space and directly after text, with and without the space.
HEADER = re.compile(r"### ?(Human|Assistant):")


@dataclass(frozen=True)
class Conversation:
    """A text and where the answers stand in it.

    ### Human: Hi ### Assistant: Hello.
    ............................xxxxxxx      the span of the answer, the space before it included
    """

    text: str  # what is tokenised; it ends where its last answer ends, and is empty when there is none
    answers: tuple[tuple[int, int], ...]  # the half-open character spans [start, end) of the answers, in order
    turns_cut: int = 0  # after the last answer, which hold nothing to train on


def parse_text(text: str, train_on: TrainOn = "all") -> Conversation:
    """Mark the answers of a conversation in Guanaco's form.

    A header is `###`, at most one space, `Human` or `Assistant`, and a colon, not preceded by a further `#`. An answer
    is what stands between the colon of an assistant header and the next header, or the end of the text, less the white
    space at its end (`str.rstrip`); where only white space is left, the turn holds no answer. What stands before the
    first header belongs to no turn and is kept as it is. Headers that somebody typed within an answer cannot be told
    from turns in this form; in the `messages` form they can.
    """
    headers = list(_headers(text))
    borders = [*(header.start() for header in headers), len(text)]
    turns = [
        (header.end(), end, header.group(1) == "Assistant") for header, end in zip(headers, borders[1:], strict=True)
    ]
    return _end_at_last_answer(text, turns, train_on)


def _headers(text: str) -> Iterator[re.Match[str]]:
    # Checked here and not by a look-behind, which would keep the search from jumping to the next "###".
    return (header for header in HEADER.finditer(text) if text[header.start() - 1 : header.start()] != "#")


def header_start(text: str) -> int | None:
    """Where the first header of a turn starts in a text, by the rules of `parse_text`; None where there is none."""
    return next((header.start() for header in _headers(text)), None)


def first_turn(text: str) -> str:
    """The text before the header of another turn, stripped."""
    return text[: header_start(text)].strip()


def render_messages(messages: Sequence[Mapping[str, Any]], train_on: TrainOn = "all") -> Conversation:
    """Write messages in Guanaco's form, with the answers known from construction.

    Each message becomes its header, a space and its content as it stands; the messages are joined by line ends. A
    header inside a content is text like any other. Messages are mappings with `role` and `content`, or `from` and
    `value`; a role is one of `system`, `user` (`human`), `assistant` (`gpt`). ValueError says which message is not so.
    """
    parts: list[str] = []
    turns: list[tuple[int, int, bool]] = []
    position = 0
    for number, message in enumerate(messages, start=1):
        header, content = _header_and_content(message, number)
        part = f"{header} {content}"
        parts.append(part)
        turns.append((position + len(header), position + len(part), header == ASSISTANT_HEADER))
        position += len(part) + 1
    return _end_at_last_answer("\n".join(parts), turns, train_on)


def render_prompt(question: str | Sequence[Mapping[str, Any]]) -> str:
    """The text that a model trained on these conversations continues with an answer to `question`.

    That is one question, or the messages so far in the form of `render_messages`. The text ends in `### Assistant:`
    without a space, because the space belongs to the first token of the answer.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    turns = [_header_and_content(message, number) for number, message in enumerate(messages, start=1)]
    return "\n".join([f"{header} {content}" for header, content in turns] + [ASSISTANT_HEADER])


def _header_and_content(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is a {type(message).__name__}, not an object with role and content")
    fields = cast(Mapping[str, Any], message)
    role, content = (_first_value(fields, names) for names in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in ROLE_HEADERS:
        raise ValueError(f"message {number} has the role {role!r}; known are {', '.join(ROLE_HEADERS)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number} has a {type(content).__name__} for its content, not a text")
    return ROLE_HEADERS[role], content


def _first_value(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value under the first of these names that has one; null is none."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _end_at_last_answer(text: str, turns: list[tuple[int, int, bool]], train_on: TrainOn) -> Conversation:
    """Keep the answers of `turns`, (start, end, by the assistant) each, and cut the text after the last of them."""
    answers: list[tuple[int, int]] = []
    turns_cut = 0
    for start, end, by_assistant in turns:
        answer = text[start:end].rstrip()
        if by_assistant and answer:
            answers.append((start, start + len(answer)))
            turns_cut = 0
        else:
            turns_cut += 1
    if not answers:
        return Conversation("", (), turns_cut)
    return Conversation(text[: answers[-1][1]], tuple(answers if train_on == "all" else answers[-1:]), turns_cut)


@dataclass(frozen=True)
class Batch:
    """Rows of a source that were read together, `read` of them; the conversations are those that hold an answer."""

    read: int
    rows: np.ndarray  # int64 [conversations]
    conversations: list[Conversation]


def read_batches(source: Source, text_field: str, train_on: TrainOn) -> Iterator[Batch]:
    """Read and parse a source, batch by batch.

    The conversations stand in the column `text_field`; where that is the default and absent, in `messages` or
    `conversations`. A text is in Guanaco's form, a list is messages. UserError names the row that holds neither.
    """
    column = None
    for rows in source.batches():
        numbers: list[int] = []
        conversations: list[Conversation] = []
        for number, row in rows:
            column = column or _conversation_column(row, source, text_field)
            if column not in row:
                raise source.lacks(number, row, column, "dataset_text_field")
            try:
                conversation = _conversation(row[column], train_on)
            except ValueError as error:
                raise UserError(f"{source.where(number)}, column {column!r}: {error}") from error
            if conversation.answers:
                numbers.append(number)
                conversations.append(conversation)
        yield Batch(len(rows), np.array(numbers, np.int64), conversations)


def _conversation_column(first_row: Row, source: Source, text_field: str) -> str:
    candidates = (text_field, *MESSAGES_COLUMNS) if text_field == TEXT_FIELD else (text_field,)
    for column in candidates:
        if column in first_row:
            return column
    raise source.lacks(0, first_row, "' or '".join(candidates), "dataset_text_field")


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
