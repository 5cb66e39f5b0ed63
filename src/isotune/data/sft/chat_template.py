"""Conversations as a chat template writes them, with the spans of the answers from what it wrote for shorter ones.

transformers renders; the spans are ours. With P the conversation before an answer and the generation prompt, and Q the
conversation up to that answer, the answer in a text D that the template wrote is what D has after P and up to Q:

    P   <user> Hi <end> <assistant>
    Q   <user> Hi <end> <assistant> Hello. <end>
    D   <user> Hi <end> <assistant> Hello. <end> <user> Bye <end> <assistant> Bye. <end>
                                   xxxxxxxxxxxxx

Some templates write an earlier turn otherwise once another follows: they drop its reasoning, or trim it. There D does
not begin with P and Q, and the answer that stands in D is not the one that the model would give. Such an answer gets a
document of its own, Q, so every answer is learnt behind exactly the tokens that will ask for it. Where not even Q
begins with P, nothing that could be trained is what the template would ask, and the row is refused.

Where the template marks what the assistant generates, by `{% generation %}`, its marks are the spans.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar, cast

from transformers.utils import chat_template_utils

from isotune.compat.chat_templates import RENDERING_ERRORS
from isotune.config.recipes import TrainOn
from isotune.data.sft.conversations import Conversation, everything
from isotune.data.sft.messages import ASSISTANT, PREAMBLE, REASONING_FIELDS, SYSTEM, USER, Example, Message
from isotune.data.sft.prefixes import bounded_rendering, prefix_lengths
from isotune.io.errors import first_line

_GENERATION = re.compile(r"\{\%[-+]?\s*generation\s*[-+]?\%\}")
FEW_MESSAGES = 6  # which are rendered one beginning after the other: to look closer would not be worth it
T = TypeVar("T")
Boundaries = Callable[[str], Sequence[int]]  # where the tokens of a text begin and end, in characters


class ChatTemplate:
    """A tokenizer's chat template, which it carries already.

    `boundaries` tells where tokens begin and end in a text that the template wrote.
    """

    def __init__(self, tokenizer: Any, boundaries: Boundaries) -> None:
        self.tokenizer, self.boundaries = tokenizer, boundaries
        self.special_tokens: list[str] = [str(token) for token in tokenizer.all_special_tokens]
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        # tokens that are never split: a turn may end with one that nobody called special, such as those of add_tokens
        self._own_tokens = [str(token.content) for token in added if token.content.strip()]
        self.unread_fields: set[str] = set()  # of messages, that no template reads: named once

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The text of some messages, with `prompt` up to where the assistant goes on; ValueError where it refuses."""
        return self.render_with_spans(messages, tools, prompt=prompt, marked=False)[0]

    def render_with_spans(
        self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False, marked: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of some messages, and where it has what the template marks as generated, in characters; else none.

        Without `marked` its marks are not looked for. ValueError where the template refuses the messages.
        """
        try:
            template = self.tokenizer.get_chat_template(None, tools)
            with bounded_rendering():
                texts, spans = cast(Any, chat_template_utils).render_jinja_template(
                    [[message | {"role": SYSTEM} if message["role"] == PREAMBLE else message for message in messages]],
                    tools=list(tools) if tools else None,
                    chat_template=template,
                    return_assistant_tokens_mask=marked and bool(_GENERATION.search(template)),
                    add_generation_prompt=prompt,
                    **self.tokenizer.special_tokens_map,
                )
        except RENDERING_ERRORS as error:
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from error
        return texts[0], spans[0] if spans else []

    def prefix_lengths(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, dict[int, int]] | None:
        """The text of some messages, and how long the part of the first of them is, by their number: `prefixes.py`."""
        template = self.tokenizer.get_chat_template(None, tools)
        as_read = [message | {"role": SYSTEM} if message["role"] == PREAMBLE else message for message in messages]
        variables = self.tokenizer.special_tokens_map
        return prefix_lengths(template, as_read, list(tools) if tools else None, variables)

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """The text that asks for an answer to the messages so far."""
        asked = Example(tuple(messages), (True,) * len(messages), tools)
        return self._settled(asked, lambda settled: self.render(settled.messages, settled.tools, prompt=True))

    def answered(self, messages: Sequence[Message], answer: str, tools: Any = None) -> str:
        """The text of some messages and an answer to them, up to the special token that ends it."""
        whole = Example((*messages, {"role": ASSISTANT, "content": answer}), (True,) * (len(messages) + 1), tools)
        text = self._settled(whole, lambda settled: self.render(settled.messages, settled.tools))
        return text.removesuffix(self.ending).rstrip() if self.ending else text

    def conversations(self, example: Example, train_on: TrainOn = "all") -> list[Conversation]:
        """The texts of a conversation with the spans of its answers: one, or more where earlier turns are rewritten.

        None without an answer to learn. ValueError where the template refuses the messages, or nothing that it writes
        for an answer begins with what asks for it.
        """
        special = any(token in str(message) for message in example.messages for token in self.special_tokens)
        wanted = [number for number in range(len(example.messages)) if _is_answer(example, number)]
        last = len(example.messages) - 1 if train_on == "everything" else max(wanted, default=-1)
        if last < 0:
            return []
        kept = replace(example, messages=example.messages[: last + 1], learn=example.learn[: last + 1])
        found = self._settled(kept, lambda settled: self._documents(settled, train_on))
        facts = {"turns_cut": len(example.messages) - last - 1, "marked": example.marked}
        return [
            replace(document, rendered=True, special_text=special, **(facts if number == 0 else {}))
            for number, document in enumerate(found)
        ]

    def _documents(self, example: Example, train_on: TrainOn) -> list[Conversation]:
        turns, found = _Turns(self, example), list[Conversation]()
        if train_on == "everything":
            text = self.render(example.messages, example.tools)
            marked = [
                turns.marked(text, number) for number in range(len(example.messages)) if example.is_marked(number)
            ]
            return [everything(text, marked)]
        wanted = [number for number in range(len(example.messages)) if _is_answer(example, number)]
        wanted = wanted[-1:] if train_on == "last" else wanted
        while wanted:  # the last of them is always found in the text that ends with it
            text, spans, prompts = turns.document(wanted)
            wanted = [number for number in wanted if number not in spans]
            if answers := sorted({span for of_answer in spans.values() for span in of_answer}):
                found.append(Conversation(text, tuple(answers), prompts=tuple(prompts)))
            elif found and spans == {0: []}:
                found[0] = replace(found[0], unasked=1)
        return found

    def _settled(self, example: Example, work: Callable[[Example], T]) -> T:
        """What `work` makes of a conversation, as it is or, where that is refused, with neighbours of one role joined.

        Templates that insist on roles in turn refuse two messages of one role; there they are one turn.
        """
        self._check_fields(example)
        try:
            return work(example)
        except ValueError:
            joined = _joined(example)
            if len(joined.messages) == len(example.messages):
                raise
            return work(joined)

    def _check_fields(self, example: Example) -> None:
        """Note fields that the template does not read; ValueError for one that an answer consists of."""
        template = self.tokenizer.get_chat_template(None, example.tools)
        self.unread_fields |= example.fields_beside(template)
        if any("reasoning_content" in message for message in example.messages):
            self.unread_fields |= set() if any(f in template for f in REASONING_FIELDS) else {"reasoning_content"}
        has_calls = any("tool_calls" in message for message in example.messages)
        for name, is_there in (("tools", bool(example.tools)), ("tool_calls", has_calls)):
            if is_there and name not in template:
                raise ValueError(
                    f"it has {name}, which the chat template does not read: leave such rows out, or give a template "
                    "that does by chat_format"
                )

    @cached_property
    def ending(self) -> str:
        """What the template writes behind an answer: the common end of two answers that share no character."""
        texts: list[str] = []
        for answer in ("b", "c"):
            try:
                texts.append(self.render(({"role": USER, "content": "a"}, {"role": ASSISTANT, "content": answer})))
            except ValueError:
                return ""
        one, other = texts
        places = range(1, min(len(one), len(other)) + 1)
        return one[len(one) - next((at - 1 for at in places if one[-at] != other[-at]), 0) :]

    @property
    def end_token(self) -> str | None:
        """The token that ends an answer, where the template writes one: a special token, else one that is added."""
        for tokens in (self.special_tokens, self._own_tokens):
            places = [(self.ending.index(token), -len(token), token) for token in tokens if token in self.ending]
            if places:
                return min(places)[2]
        return None


class _Turns:
    """The texts that a template writes for the beginnings of one conversation, each rendered at most once.

    Of a long one most are parts of a single rendering, where the template shows that it can be so.
    """

    def __init__(self, template: ChatTemplate, example: Example) -> None:
        self.template, self.messages, self.tools = template, example.messages, example.tools
        self.until = lru_cache(None)(self._until)  # of this conversation alone

    @cached_property
    def _beginnings(self) -> tuple[str, dict[int, int], dict[bool, str]]:
        """The text of all messages, how long that of the first of them is, and what ends it, by whether it asks."""
        text = self.template.render(self.messages, self.tools) if len(self.messages) > FEW_MESSAGES else ""
        found = self.template.prefix_lengths(self.messages, self.tools) if text else None
        if found is None or found[0] != text:
            return "", {}, {}
        turns = text[: found[1][len(self.messages)]]
        asking = self.template.render(self.messages, self.tools, prompt=True)
        if not asking.startswith(turns):
            return "", {}, {}
        return text, found[1], {False: text[len(turns) :], True: asking[len(turns) :]}

    def _until(self, count: int, prompt: bool) -> str:
        text, lengths, endings = self._beginnings
        if count in lengths:
            return text[: lengths[count]] + endings[prompt]
        return self.template.render(self.messages[:count], self.tools, prompt=prompt) if count or prompt else ""

    def document(self, wanted: Sequence[int]) -> tuple[str, dict[int, list[tuple[int, int]]], list[int]]:
        """The text up to the last of the wanted answers, and the spans of those that it has as they would be given.

        Then where what asks for each of these ends.
        """
        last = wanted[-1]
        text, marks = self.template.render_with_spans(self.messages[: last + 1], self.tools)
        spans: dict[int, list[tuple[int, int]]] = {}
        prompts: list[int] = []
        for number in wanted:
            span = self._span(text, number, is_last=number == last)
            if span is not None:
                start, end = span
                inside = [mark for mark in marks if mark[0] < end and mark[1] > start]
                spans[number] = inside if marks else [span]
                prompts.append(start)
        if last not in spans and last == 0:
            return text, {0: []}, []  # nothing asks for it
        if last not in spans:
            raise ValueError(
                f"message {last + 1}: the chat template asks for this answer with another text than it writes before "
                "it in training: give another template by chat_format"
            )
        return text, spans, prompts

    def marked(self, text: str, number: int) -> tuple[int, int]:
        """Where an answer that the data ask not to learn stands in the text of all messages."""
        span = self._span(text, number, is_last=number == len(self.messages) - 1)
        if span is None:
            raise ValueError(
                f"message {number + 1} is marked not to be learnt, and the chat template writes it otherwise here than "
                "where it ends the text: train_on: all leaves it out"
            )
        return span

    def _span(self, text: str, number: int, *, is_last: bool) -> tuple[int, int] | None:
        """Where an answer stands in `text` as it would be given there; None where the template wrote it otherwise."""
        before = self.until(number, True) if number else self._opening(text)
        if before is None or not text.startswith(before):
            return None
        if is_last:
            return len(before), len(text)
        up_to = self.until(number + 1, False)
        if text.startswith(up_to):
            return len(before), len(up_to)
        # a template may close the whole text, as Phi's does with eos, and only a longer text shows where the turn ends
        end = self._shared(text, up_to)
        closing = up_to[end:]
        if end > len(before) and number and closing == self._closing(number):
            return len(before), end
        return None

    def _opening(self, text: str) -> str | None:
        """What stands in `text` before an answer that opens it: the prompt of a question, where no question is.

        None where the template writes something else before such an answer.
        """
        question = ({"role": USER, "content": "a"},)
        asked = self.template.render(question, self.tools)
        prompt = self.template.render(question, self.tools, prompt=True)
        if not prompt.startswith(asked):
            return None
        shared = self._shared(text, asked)
        places = [place for place in (0, *self.template.boundaries(text)) if place <= shared]
        starts = (place for place in sorted(places, reverse=True) if text.startswith(prompt[len(asked) :], place))
        return next((text[:place] + prompt[len(asked) :] for place in starts), None)

    def _closing(self, number: int) -> str:
        """What the template writes at the end of the messages before an answer where nothing asks for it."""
        closed, asked = self.until(number, False), self.until(number, True)
        return closed[self._shared(closed, asked) :]

    def _shared(self, one: str, other: str) -> int:
        """How many characters two texts have in common at their start, in whole tokens of both."""
        limit = min(len(one), len(other))
        # the longest common beginning, found by bisection: true for the lengths up to it, then false
        common = bisect_right(range(1, limit + 1), False, key=lambda length: one[:length] != other[:length])
        places = set(self.template.boundaries(one)) & set(self.template.boundaries(other))
        return max((place for place in places if place <= common), default=0)


def _is_answer(example: Example, number: int) -> bool:
    message = example.messages[number]
    says = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
    return example.is_answer(number) and bool(says)


def _joined(example: Example) -> Example:
    """The conversation with neighbouring messages of one role, of texts alone, as one message."""
    messages: list[Message] = []
    learn: list[bool] = []
    asked = 0
    for number, (message, may_be_learnt) in enumerate(zip(example.messages, example.learn, strict=True)):
        same = messages and {*messages[-1], *message} == {"role", "content"} and messages[-1]["role"] == message["role"]
        begins = number == example.asked and message["role"] == ASSISTANT  # an answer behind one that is asked with
        if same and learn[-1] == may_be_learnt and not begins:
            messages[-1] = messages[-1] | {"content": f"{messages[-1]['content']}\n{message['content']}"}
        else:
            messages.append(message)
            learn.append(may_be_learnt)
        asked = len(messages) if number < example.asked else asked
    return Example(tuple(messages), tuple(learn), example.tools, asked)
