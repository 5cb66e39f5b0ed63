"""The forms of rows that are found in the wild, by the names of their columns, as conversations, texts or tokens.

    messages | conversations  (system, tools)    a list of messages, each by role and content or from and value
    text                                         Guanaco's form, or any text for train_on: everything
    prompt, completion                           texts, or messages
    instruction, output  (input)                 Alpaca's; context and response, as in Dolly, mean the same
    question, answer                             and the other names in QUESTIONS and ANSWERS
    input_ids  (labels | assistant_masks | ...)  rows that somebody has tokenised

`dataset_text_field` names one column that holds a text or messages, `dataset_prompt_field` and
`dataset_completion_field` those of a question and its answer, and then no other form is looked for. A form that is
guessed by the names of its columns is said.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np

from isotune.data.contents import written_list
from isotune.data.sft.conversations import header_start
from isotune.data.sft.messages import ASSISTANT, ROLE_FIELDS, USER, Example, example_of, exchange, tools_of
from isotune.data.sources.source import Row, is_null, kind_of_value

TEXT_FIELD = "text"
MESSAGES_COLUMNS = ("messages", "conversations", "conversation")
INSTRUCTION = "instruction"
QUESTIONS = ("question", "query", "prompt")
ANSWERS = ("answer", "response", "chosen_answer")
MORE = ("input", "context")  # stands below an instruction, in Alpaca's form and in Dolly's
INPUT_IDS = "input_ids"
MASKS = ("assistant_masks", "completion_mask", "loss_mask")
SYSTEM_COLUMNS = ("system", "system_prompt")
BESIDE = (*SYSTEM_COLUMNS, "tools", "functions")  # are read with every form but a text that is laid out already
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # a text beside them has placeholders for them
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenRow:
    """A row that somebody has tokenised: it is trained on as it stands."""

    input_ids: np.ndarray  # int32 [tokens]
    supervised: np.ndarray  # bool [tokens]


Content = Example | str | TokenRow  # a text is in Guanaco's form, or is learnt as a whole
Reader = Callable[[Row], Content]


@dataclass(frozen=True)
class NamedColumns:
    """The columns that a recipe or a task names."""

    text: str = TEXT_FIELD  # of a text or messages; that name itself says nothing
    prompt: str | None = None  # of a question, with `completion`
    completion: str | None = None

    @property
    def wanted(self) -> dict[str, str]:
        """The columns that every row must have, by the key that names them."""
        if self.prompt and self.completion:
            return {"dataset_prompt_field": self.prompt, "dataset_completion_field": self.completion}
        return {} if self.text == TEXT_FIELD else {"dataset_text_field": self.text}


@dataclass(frozen=True)
class Form:
    """How rows of some columns are read."""

    read: Reader  # given the columns that are not null; ValueError says what is wrong with a value
    columns: tuple[str, ...]  # that it reads
    note: str | None = None  # the sentence to say where it is a guess


@lru_cache(maxsize=1_024)
def form_of(names: tuple[str, ...], named: NamedColumns) -> Form | None:
    """The form of a row by the names of its columns that are not null; None where no form is known by these.

    Its `read` raises ValueError, which says what is wrong with a value.
    """
    if named.wanted:
        if not set(named.wanted.values()) <= set(names):
            return None
        columns = tuple(named.wanted.values())
        return Form(_pair(*columns) if len(columns) == 2 else _text_or_messages(*columns), columns)
    # tokens and their labels say more than what they were made of: `map` keeps that beside them
    found = [name for name in (INPUT_IDS, TEXT_FIELD, *MESSAGES_COLUMNS) if name in names]
    if found:
        left, more = found[1:], _guessed(tuple(name for name in names if name not in found))
        note = None
        if left or more:
            left += more.columns if more else ()
            note = f"rows are read from the column {found[0]!r}, and {_listed(left)} {'are' if left[1:] else 'is'} left"
        if more and found[0] != INPUT_IDS:
            note = f"{note}: a question and its answer, which are read where {_listed(found)} is not there"
        return Form(_tokens if found[0] == INPUT_IDS else _text_or_messages(found[0]), (found[0],), note)
    return _guessed(names) or _in_other_case(names, named)


def _in_other_case(names: tuple[str, ...], named: NamedColumns) -> Form | None:
    """The form by the names in lower case and without blanks around them, where they are others and still differ."""
    own = {name.strip().lower(): name for name in names}
    if len(own) < len(names) or tuple(own) == names:
        return None
    form = form_of(tuple(own), named)
    if form is None:
        return None
    columns = tuple(own[name] for name in form.columns)
    read: Reader = lambda row: form.read({name: row[column] for name, column in own.items()})  # noqa: E731
    return Form(read, columns, form.note or f"rows are read from the column {' and '.join(map(repr, columns))}")


def _guessed(names: tuple[str, ...]) -> Form | None:
    """A question and its answer in columns that are known by their names."""
    asked, more, answered = _exchange_columns(names)
    if not asked or not answered:
        return None
    columns = (asked, *more, answered)
    left = [name for name in names if name not in columns and name.strip().lower() not in BESIDE]
    note = (
        f"a row is a question, from {_listed(columns[:-1])}, and its answer, from {answered!r}"
        f"{f'; not read: {_listed(left)}' if left else ''} (dataset_prompt_field, dataset_completion_field name others)"
    )
    read = _instruction(asked, more, answered) if asked == INSTRUCTION else _pair(asked, answered)
    return Form(read, columns, note)


def _exchange_columns(names: Sequence[str]) -> tuple[str | None, tuple[str, ...], str | None]:
    """The columns of a question, of what is added to it, and of its answer, as far as they are there."""
    if "prompt" in names and "completion" in names:
        return "prompt", (), "completion"
    if INSTRUCTION in names and (answer := next((name for name in ("output", *ANSWERS) if name in names), None)):
        # in any case, as evaluation asks it
        own = {name.strip().lower(): name for name in names} | {name: name for name in names}
        return INSTRUCTION, tuple(own[name] for name in MORE if name in own), answer
    question = next((name for name in QUESTIONS if name in names), None)
    answer = next((name for name in ANSWERS if name in names), None)
    if question is None and "input" in names and "output" in names:
        return "input", (), "output"
    return question, (), answer


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def system_in(row: Row) -> Any:
    """What stands before the messages of a row without nulls, in a column of its own; None where it has none."""
    own = {name: row[name] for name in SYSTEM_COLUMNS if name in row}
    told = {name: value for name, value in own.items() if not isinstance(value, str) or value.strip()} or own
    if len({str(value).strip() for value in told.values()}) > 1:
        raise ValueError(f"the columns {_listed(tuple(told))} say different things: leave one of them out")
    return next(iter(told.values()), None)


def with_usual_names(row: Row) -> Row:
    """A row with what stands beside its messages under the usual names too, where it has them in another case."""
    found = {usual: value for name, value in row.items() if (usual := name.strip().lower()) in BESIDE}
    return found | row if found else row


def check_media(row: Row, named: Collection[str]) -> None:
    """Raise ValueError where something else than text stands beside the texts, in a column that is not `named`."""
    for name, value in row.items():
        if name.strip().lower() in MEDIA and name not in named and _holds_something(value):
            raise ValueError(
                f"column {name!r}: stands beside the texts, and only texts can be read: leave the row out, or "
                "the column where the texts need none of it"
            )


def _holds_something(value: Any) -> bool:
    value = list(cast(dict[Any, Any], value).values()) if isinstance(value, dict) else value
    if isinstance(value, list):
        return any(map(_holds_something, cast(list[Any], value)))
    return not is_null(value) and value not in ("", "[]")


def left_below(row: Row, named: NamedColumns) -> str | None:
    """The sentence about what stands below an instruction that is named, and is not read; None without."""
    if not named.prompt or not named.completion or named.prompt.strip().lower() != INSTRUCTION:
        return None
    below = [name for name, value in row.items() if name.strip().lower() in MORE and value != ""]
    left = [name for name in below if name not in named.wanted.values()]
    return f"not read below {named.prompt!r}, which dataset_prompt_field names alone: {_listed(left)}" if left else None


def left_beside(row: Row, content: Content) -> str | None:
    """The sentence about what stands beside a text that is laid out already, and is not part of it; None without."""
    if not isinstance(content, str):
        return None
    own = {name: value for name, value in row.items() if name.strip().lower() in BESIDE}
    told = tuple(name for name, value in own.items() if value != [] and (not isinstance(value, str) or value.strip()))
    if not told:
        return None
    return f"not read beside a text, which stands for itself: {_listed(told)} (messages have a place for them)"


def _named(name: str, read: Any) -> Any:
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from error


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"column {name!r}: holds {kind_of_value(row[name])}, not a text")
    return row[name]


def _text_or_messages(name: str) -> Reader:
    def read(row: Row) -> Content:
        value = as_messages(row[name])
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError(f"column {name!r}: holds {kind_of_value(value)}, neither a text nor a list of messages")
        return _named(name, lambda: example_of(cast(list[Any], value), system_in(row), tools_of(row)))

    return read


def as_messages(value: Any) -> Any:
    """Messages that a text writes out, or that are columns of one object, as a list; everything else as it is."""
    written = written_list(value)
    if written and all(isinstance(each, dict) and any(own in each for own in ROLE_FIELDS) for each in written):
        return written
    table = cast(dict[Any, Any], value) if isinstance(value, dict) else {}
    columns = {str(name): own for name, own in table.items() if own is not None}
    lengths = {len(cast(list[Any], own)) if isinstance(own, list) else -1 for own in columns.values()}
    if len(lengths) != 1 or -1 in lengths or not any(name in columns for name in ROLE_FIELDS):
        return cast(Any, value)
    return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]


def _instruction(asked: str, more: Sequence[str], answered: str) -> Reader:
    """Alpaca's form: what is added stands below the question and an empty line."""

    def read(row: Row) -> Content:
        parts = [_text(row, asked), *(_text(row, name) for name in more if row.get(name))]
        return exchange("\n\n".join(parts), _text(row, answered), system_in(row), tools_of(row))

    return read


def _pair(asked: str, answered: str) -> Reader:
    """A question and its answer as texts, or messages and those that answer them."""

    def read(row: Row) -> Content:
        prompt, completion = (as_messages(row[name]) for name in (asked, answered))
        for name, value in ((asked, prompt), (answered, completion)):
            if not isinstance(value, str | list):
                raise ValueError(
                    f"column {name!r}: holds {kind_of_value(value)}, neither a text nor a list of messages"
                )
        if isinstance(prompt, str) and isinstance(completion, str):
            if header_start(prompt) is not None:  # the prompt is laid out already
                return prompt + completion
            return _named(asked, lambda: exchange(prompt, completion, system_in(row), tools_of(row)))
        first = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt
        second = [{"role": ASSISTANT, "content": completion}] if isinstance(completion, str) else completion
        try:
            whole = example_of([*first, *second], system_in(row), tools_of(row))
        except ValueError:  # which of the two is at fault, and by its own numbers
            _named(asked, lambda: example_of(first, system_in(row), tools_of(row)))
            _named(answered, lambda: example_of(second))
            raise
        return replace(whole, asked=len(whole.messages) - len(second))

    return read


def _tokens(row: Row) -> TokenRow:
    ids = _integers(row, INPUT_IDS)
    kept = np.ones(len(ids), bool)
    if "attention_mask" in row:
        kept = _beside(row, "attention_mask", ids) != 0
    supervised = np.ones(len(ids), bool)
    if "labels" in row:
        labels = _beside(row, "labels", ids)
        supervised = labels != IGNORED_LABEL
        wrong = np.flatnonzero(supervised & kept & (labels != ids))
        if len(wrong):
            at = wrong[0]
            raise ValueError(
                f"column 'labels': token {at + 1} is {labels[at]}, and input_ids has {ids[at]} there: "
                f"a label is the token at its own place, or {IGNORED_LABEL}"
            )
    for name in (name for name in MASKS if name in row):
        supervised &= _beside(row, name, ids) != 0
    if "position_ids" in row:
        several = (_beside(row, "position_ids", ids)[kept] != np.arange(int(kept.sum()))).any()
    else:
        several = "seq_lengths" in row and len(_integers(row, "seq_lengths")) > 1
    if several:
        raise ValueError("holds several documents in one row: give one a row, they are packed here")
    return TokenRow(ids[kept].astype(np.int32), supervised[kept])


def _integers(row: Mapping[str, Any], name: str) -> np.ndarray:
    value = row[name]
    if not isinstance(value, Sequence) or not all(isinstance(number, int) for number in cast(Sequence[Any], value)):
        raise ValueError(f"column {name!r}: holds {kind_of_value(value)}, not a list of whole numbers")
    numbers = cast(Sequence[int], value)
    if any(abs(number) >= 2**31 for number in numbers):
        raise ValueError(f"column {name!r}: holds {max(numbers, key=abs)}, which is no token of any vocabulary")
    return np.array(numbers, np.int64)


def _beside(row: Mapping[str, Any], name: str, ids: np.ndarray) -> np.ndarray:
    values = _integers(row, name)
    if len(values) != len(ids):
        raise ValueError(f"column {name!r}: has {len(values)} numbers, and input_ids {len(ids)}")
    return values
