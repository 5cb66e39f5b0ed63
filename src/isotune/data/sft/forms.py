"""The forms of rows that are found in the wild, by the names of their columns, as conversations, texts or tokens.

    messages | conversations  (system, tools)    a list of messages, each by role and content or from and value
    text                                         Guanaco's form, or any text for train_on: everything
    prompt, completion                           texts, or messages
    instruction, output  (input)                 Alpaca's; context and response, as in Dolly, mean the same
    question, answer                             and the other names in QUESTIONS and ANSWERS
    input_ids  (labels | assistant_masks | ...)  rows that somebody has tokenised

`dataset_text_field` names one column that holds a text or messages, and then no other form is looked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from isotune.data.sft.conversations import header_start
from isotune.data.sft.messages import ASSISTANT, USER, Example, example_of, exchange
from isotune.data.sources.source import Row, kind_of_value

TEXT_FIELD = "text"
MESSAGES_COLUMNS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "query", "prompt")
ANSWERS = ("answer", "response", "chosen_answer")
INPUT_IDS = "input_ids"
MASKS = ("assistant_masks", "completion_mask", "loss_mask")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenRow:
    """A row that somebody has tokenised: it is trained on as it stands."""

    input_ids: np.ndarray  # int32 [tokens]
    supervised: np.ndarray  # bool [tokens]


Content = Example | str | TokenRow  # a text is in Guanaco's form, or is learnt as a whole


def read_row(row: Row, text_field: str = TEXT_FIELD) -> Content | None:
    """What a row holds; None where no form is known by its columns. ValueError says what is wrong with a value."""
    given = {name: value for name, value in row.items() if value is not None}
    names = (TEXT_FIELD, *MESSAGES_COLUMNS) if text_field == TEXT_FIELD else (text_field,)
    for name in names:
        if name in given:
            return _named(name, lambda name=name: _text_or_messages(given[name], given))
    if text_field != TEXT_FIELD:
        return None
    if INPUT_IDS in given:
        return _tokens(given)
    if "prompt" in given and "completion" in given:
        return _named("prompt", lambda: _prompt_and_completion(given))
    if "instruction" in given:
        answer = next((name for name in ("output", *ANSWERS) if name in given), None)
        more = next((given[name] for name in ("input", "context") if given.get(name)), "")
        if answer is not None:
            question = _text(given, "instruction")
            if not isinstance(more, str):
                raise ValueError(f"its input is {kind_of_value(more)}, not a text")
            return exchange(f"{question}\n\n{more}" if more else question, _text(given, answer), given.get("system"))
    question = next((name for name in QUESTIONS if name in given), None)
    answer = next((name for name in ANSWERS if name in given), None)
    if question is None and "input" in given and "output" in given:
        question, answer = "input", "output"
    if question is not None and answer is not None:
        return exchange(_text(given, question), _text(given, answer), given.get("system"))
    return None


def _named(name: str, read: Any) -> Any:
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from error


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"column {name!r}: holds {kind_of_value(row[name])}, not a text")
    return row[name]


def _text_or_messages(value: Any, row: Row) -> Content:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"holds {kind_of_value(value)}, neither a text nor a list of messages")
    return example_of(cast(list[Any], value), row.get("system"), row.get("tools"))


def _prompt_and_completion(row: Row) -> Content:
    """A question and its answer as texts, or messages and those that answer them."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if header_start(prompt) is not None:  # the prompt is laid out already
            return prompt + completion
        return exchange(prompt, completion, row.get("system"))
    asked = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [{"role": ASSISTANT, "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(asked, list) or not isinstance(answered, list):
        raise ValueError("prompt and completion are neither texts nor lists of messages")
    whole = example_of([*asked, *answered], row.get("system"), row.get("tools"))
    before = len(whole.messages) - len(cast(list[Any], answered))  # an answer within the prompt is not learnt
    learn = tuple(may_be_learnt and number >= before for number, may_be_learnt in enumerate(whole.learn))
    return Example(whole.messages, learn, whole.tools)


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
    return TokenRow(ids[kept].astype(np.int32), supervised[kept])


def _integers(row: Mapping[str, Any], name: str) -> np.ndarray:
    value = row[name]
    if not isinstance(value, Sequence) or not all(isinstance(number, int) for number in cast(Sequence[Any], value)):
        raise ValueError(f"column {name!r}: holds {kind_of_value(value)}, not a list of whole numbers")
    return np.array(value, np.int64)


def _beside(row: Mapping[str, Any], name: str, ids: np.ndarray) -> np.ndarray:
    values = _integers(row, name)
    if len(values) != len(ids):
        raise ValueError(f"column {name!r}: has {len(values)} numbers, and input_ids {len(ids)}")
    return values
