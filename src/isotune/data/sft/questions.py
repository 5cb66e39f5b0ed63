"""What a row asks a language model, whether or not an answer stands beside it.

The columns are those of training rows without their answer: `dataset_prompt_field` where it is named, else a list of
messages, a question under one of its usual names, or a text. Of a whole conversation all that stands before its last
answer is asked.
"""

from itertools import takewhile
from typing import Any, cast

from isotune.data.sft.conversations import header_start
from isotune.data.sft.forms import (
    INSTRUCTION,
    MESSAGES_COLUMNS,
    MORE,
    QUESTIONS,
    TEXT_FIELD,
    NamedColumns,
    as_messages,
    check_media,
    system_in,
)
from isotune.data.sft.messages import ASSISTANT, SYSTEM, TOOL, USER, Message, example_of, read_tools, tools_of
from isotune.data.sft.reading import example_of_text
from isotune.data.sources.source import Row, is_null, kind_of_value

NO_QUESTION, NULL = "without a question", "a null instead of a question"
Question = tuple[tuple[Message, ...], tuple[Any, ...] | None]  # messages, the last one a user's or a tool's; tools


def question_column(row: Row, named: NamedColumns) -> str | None:
    """The column that holds a row's question; None where no form is known by its columns."""
    if wanted := named.prompt or (named.text if named.text != TEXT_FIELD else None):
        return wanted if wanted in row else None
    candidates = (*MESSAGES_COLUMNS, INSTRUCTION, *QUESTIONS, TEXT_FIELD)
    own = {name.strip().lower(): name for name in row} | {name: name for name in row}  # in any spelling, as in training
    found = [own[name] for name in candidates if name in own]
    return next((name for name in found if not is_null(row[name])), found[0] if found else None)


def question_of(row: Row, column: str, *, is_named: bool = False) -> Question | str:
    """The messages that a row asks to be answered, and its tools; or why there are none to ask.

    What stands beside an instruction is asked with it unless the column `is_named`, as in training. ValueError says
    what is wrong with a cell.
    """
    if is_null(row[column]):
        return NULL
    check_media(row, (column,))
    cell = as_messages(row[column])
    given = {name: own for name, own in row.items() if not is_null(own)}
    row = {name.strip().lower(): own for name, own in given.items()} | given
    beside, tools = system_in(row), tools_of(row)
    if isinstance(cell, list):
        messages = example_of(cast(list[Any], cell), beside, tools).messages
    elif not isinstance(cell, str):
        raise ValueError(f"column {column!r}: holds {kind_of_value(cell)}, neither a text nor a list of messages")
    elif header_start(cell) is not None:
        messages, tools = example_of_text(cell).messages, None  # a text that is laid out stands for itself
    else:
        has_more = not is_named and column.strip().lower() == INSTRUCTION
        added = [row[name] for name in MORE if row.get(name)] if has_more else []
        if wrong := next((value for value in added if not isinstance(value, str)), None):
            raise ValueError(f"an {' or '.join(MORE)} is {kind_of_value(wrong)}, not a text")
        messages = example_of([{"role": USER, "content": "\n\n".join([cell, *added])}], beside).messages
    asked = _before_last_answer(messages)
    if not any(message["content"].strip() for message in asked if message["role"] != SYSTEM):
        return NO_QUESTION
    return asked, read_tools(tools)


def _before_last_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages until the last that somebody else than the assistant wrote, with what the system adds to it."""
    last = max((at for at, message in enumerate(messages) if message["role"] in (USER, TOOL)), default=-1)
    more = takewhile(lambda message: message["role"] != ASSISTANT, messages[last + 1 :])
    return (*messages[: last + 1], *more) if last >= 0 else ()
