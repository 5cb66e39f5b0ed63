"""Conversations as one text with the spans of its answers, so the supervised mask never guesses where a turn ends.

Here is Guanaco's form, `### Human: ... ### Assistant: ...`; a chat template's is in `chat_template.py`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isotune.config.recipes import TrainOn
from isotune.data.sft.messages import ASSISTANT, PREAMBLE, SYSTEM, TOOL, USER, Example, Message, as_json, example_of

HUMAN_HEADER = "### Human:"
ASSISTANT_HEADER = "### Assistant:"
TOOLS_HEADER = "### Tools:"  # of the schemas of the tools, one a line, after a system message where there is one
ROLE_HEADERS = {
    SYSTEM: "### System:",
    USER: HUMAN_HEADER,
    ASSISTANT: ASSISTANT_HEADER,
    TOOL: "### Tool:",  # what a tool answered
}
REASONING_OPENS, REASONING_CLOSES = "<think>", "</think>"
# Real data has headers after a line end, after a space and directly after text, with and without the space.
HEADER = re.compile(r"### ?(Human|Assistant):")
SYSTEM_HEADER = re.compile(r"### ?System:")  # of what stands before the first turn
# what other programs, and the messages here, call those who speak: no headers in a text
_OTHER_HEADER = re.compile(r"### ?(?:user|system|tools?|instruction|response|bot|gpt|ai|human|assistant) ?:", re.I)


@dataclass(frozen=True)
class Conversation:
    """A text and where the answers stand in it.

    ### Human: Hi ### Assistant: Hello.
    ............................xxxxxxx      the span of the answer, the space before it included
    """

    text: str  # what is tokenised; it ends where its last answer ends, and is empty when there is none
    answers: tuple[tuple[int, int], ...]  # the half-open character spans [start, end) of the answers, in order
    turns_cut: int = 0  # after the last answer, which hold nothing to train on
    # a chat template wrote the text: its special tokens are tokens, and none is added before or after it
    rendered: bool = False
    special_text: bool | None = None  # whether somebody wrote out a special token; None: it is looked for in the text
    marked: int = 0  # answers that the data ask not to learn
    unasked: int = 0  # answers that open it, for which the template has no prompt: they are not learnt
    prompts: tuple[int, ...] = ()  # where what asks for each answer ends, where a template wrote the text


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


def unknown_header(text: str) -> str | None:
    """A header of another name in a text, such as `### User:`, which belongs to the turn before it; None without."""
    first = header_start(text)
    if first is None:
        return None
    for found in _OTHER_HEADER.finditer(text):
        is_system = found.start() < first and SYSTEM_HEADER.match(found[0])
        if not is_system and not HEADER.match(found[0]) and text[found.start() - 1 : found.start()] != "#":
            return found[0]
    return None


def first_turn(text: str) -> str:
    """The text before the header of another turn, stripped."""
    return text[: header_start(text)].strip()


def turns_of(text: str) -> list[Message]:
    """The turns of a text in Guanaco's form as messages, their contents stripped.

    What stands before the first header is a system message behind `### System:`, else a message of the role PREAMBLE.
    """
    headers = list(_headers(text))
    if not headers:
        return []
    before = text[: headers[0].start()].strip()
    turns: list[Message] = [{"role": PREAMBLE, "content": before}] if before else []
    if system := SYSTEM_HEADER.match(before):
        turns = [{"role": SYSTEM, "content": before[system.end() :].strip()}]
    borders = [*(header.start() for header in headers[1:]), len(text)]
    for header, end in zip(headers, borders, strict=True):
        role = USER if header.group(1) == "Human" else ASSISTANT
        turns.append({"role": role, "content": text[header.end() : end].strip()})
    return turns


def render_example(example: Example, train_on: TrainOn = "all") -> Conversation:
    """Write a conversation in Guanaco's form, with the answers known from construction.

    Each message becomes its header, a space and its content as it stands; the messages are joined by line ends. A
    header inside a content is text like any other. Reasoning stands before its answer in `<think>`, tool calls after
    it as JSON in `<tool_call>`, both as in Qwen's templates and both part of the answer. An answer that the data ask
    not to learn is text like a question, and not learnt by train_on: everything either.
    """
    parts: list[str] = []
    turns: list[tuple[int, int, bool]] = []
    marked: list[tuple[int, int]] = []
    position = 0
    for header, body, number in _parts(example):
        part = f"{header} {body}" if header else body
        parts.append(part)
        span = position + len(header), position + len(part)
        turns.append((*span, number is not None and example.is_answer(number)))
        if number is not None and example.is_marked(number):
            marked.append(span)
        position += len(part) + 1
    text = "\n".join(parts)
    if train_on == "everything":
        return replace(everything(text, marked), marked=example.marked)
    ended = _end_at_last_answer(text, turns, train_on)
    return Conversation(ended.text, ended.answers, ended.turns_cut, marked=example.marked)


def everything(text: str, left_out: Sequence[tuple[int, int]] = ()) -> Conversation:
    """A text that is learnt as a whole, but for some spans in their order; white space alone is nothing to learn."""
    starts, ends = [0, *(end for _, end in left_out)], [*(start for start, _ in left_out), len(text)]
    learnt = tuple((start, end) for start, end in zip(starts, ends, strict=True) if text[start:end].strip())
    return Conversation(text, learnt) if learnt else Conversation("", ())


def render_prompt(question: str | Sequence[Mapping[str, Any]], tools: Any = None) -> str:
    """The text that a model trained on these conversations continues with an answer to `question`.

    That is one question, or the messages so far in the form of `render_example`. The text ends in `### Assistant:`
    without a space, because the space belongs to the first token of the answer.
    """
    messages = [{"role": USER, "content": question}] if isinstance(question, str) else question
    asked = _with_preamble(messages, tools)
    return "\n".join([*(f"{header} {body}" if header else body for header, body, _ in _parts(asked)), ASSISTANT_HEADER])


def _with_preamble(messages: Sequence[Mapping[str, Any]], tools: Any) -> Example:
    before = [dict(message) for message in messages if message.get("role") == PREAMBLE]
    rest = example_of([message for message in messages if message.get("role") != PREAMBLE], tools=tools)
    return Example((*before, *rest.messages), (*(True for _ in before), *rest.learn), rest.tools)


def _parts(example: Example) -> Iterator[tuple[str, str, int | None]]:
    """Each message's header, what follows it, and its number; the tools have a part of their own, without a number."""
    tools = "\n".join(map(as_json, example.tools)) if example.tools else None
    after_system = bool(example.messages) and example.messages[0]["role"] == SYSTEM
    if tools and not after_system:
        yield TOOLS_HEADER, tools, None
    for number, message in enumerate(example.messages):
        yield ROLE_HEADERS.get(message["role"], ""), body_of(message), number
        if tools and after_system and number == 0:
            yield TOOLS_HEADER, tools, None


def body_of(message: Message) -> str:
    """What a message says, with its reasoning and its tool calls."""
    reasoning = message.get("reasoning_content")
    body = message["content"]
    if reasoning:
        body = f"{REASONING_OPENS}\n{reasoning}\n{REASONING_CLOSES}\n\n{body}"
    calls = [f"<tool_call>\n{_call_text(call['function'])}\n</tool_call>" for call in message.get("tool_calls", ())]
    return "\n".join([*([body] if body or not calls else []), *calls])


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    given = arguments if isinstance(arguments, str) else as_json(arguments)
    return f'{{"name": {as_json(function["name"])}, "arguments": {given}}}'


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
    return Conversation(text[: answers[-1][1]], tuple(answers[-1:] if train_on == "last" else answers), turns_cut)
