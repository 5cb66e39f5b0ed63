"""Conversations as one text with the spans of its answers, so the supervised mask never guesses where a turn ends."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

TrainOn = Literal["all", "last"]

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

    Attributes:
        text: what is tokenised; it ends where its last answer ends, and is empty when there is none.
        answers: the half-open character spans [start, end) of the supervised answers, in order.
        turns_cut: turns after the last answer, which hold nothing to train on.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    turns_cut: int = 0


def parse_text(text: str, train_on: TrainOn = "all") -> Conversation:
    """Mark the answers of a conversation in Guanaco's form.

    A header is `###`, at most one space, `Human` or `Assistant`, and a colon, not preceded by a further `#`. An answer
    is what stands between the colon of an assistant header and the next header, or the end of the text, less the white
    space at its end (`str.rstrip`); where only white space is left, the turn holds no answer. What stands before the
    first header belongs to no turn and is kept as it is. Headers that somebody typed within an answer cannot be told
    from turns in this form; in the `messages` form they can.
    """
    # Checked here and not by a look-behind, which would keep the search from jumping to the next "###".
    headers = [header for header in HEADER.finditer(text) if text[header.start() - 1 : header.start()] != "#"]
    borders = [*(header.start() for header in headers), len(text)]
    turns = [
        (header.end(), end, header.group(1) == "Assistant") for header, end in zip(headers, borders[1:], strict=True)
    ]
    return _end_at_last_answer(text, turns, train_on)


def render_messages(messages: Sequence[Mapping[str, Any]], train_on: TrainOn = "all") -> Conversation:
    """Write messages in Guanaco's form, with the answers known from construction.

    Each message becomes its header, a space and its content as it stands; the messages are joined by line ends. A
    header inside a content is text like any other.

    Args:
        messages: mappings with `role` and `content`, or `from` and `value`; a role is one of `system`, `user`
            (`human`), `assistant` (`gpt`).

    Raises:
        ValueError: a message is not such a mapping; the sentence says which and why.
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
    """The text that a model trained on these conversations continues with an answer.

    It ends in `### Assistant:` without a space, because the space belongs to the first token of the answer.

    Args:
        question: one question, or the messages so far in the form of `render_messages`.

    Raises:
        ValueError: a message has no known role or no text.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    turns = [_header_and_content(message, number) for number, message in enumerate(messages, start=1)]
    return "\n".join([f"{header} {content}" for header, content in turns] + [ASSISTANT_HEADER])


def _header_and_content(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is a {type(message).__name__}, not an object with role and content")
    fields = cast(Mapping[str, Any], message)
    role = fields.get("role", fields.get("from"))
    content = fields.get("content", fields.get("value"))
    if not isinstance(role, str) or role not in ROLE_HEADERS:
        raise ValueError(f"message {number} has the role {role!r}; known are {', '.join(ROLE_HEADERS)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number} has a {type(content).__name__} for its content, not a text")
    return ROLE_HEADERS[role], content


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
