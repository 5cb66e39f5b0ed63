"""A Modelfile, with which Ollama asks an exported model as it was trained: its chat template in Go's template language.

A run's template is a Jinja program. What it writes around turns is read off from conversations that it renders, laid
out as a Go template, and compared with what it renders of other ones. A template that trims, moves or rewrites turns
cannot be laid out so, and gets no Modelfile.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isotune.data.sft.chat_format import GUANACO
from isotune.data.sft.chat_template import ChatTemplate
from isotune.data.sft.conversations import HUMAN_HEADER
from isotune.data.sft.messages import ASSISTANT, SYSTEM, USER
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.data.tokenizer import prefix_of
from isotune.models.base.ending import eos_ids_of
from isotune.models.packed_attention import max_positions

MODELFILE = "Modelfile"
FOLDER = "."  # as FROM names safetensors beside the Modelfile
ARCHITECTURES = ("gemma", "gemma2", "llama", "mistral", "mixtral", "phi3", "qwen2")  # that Ollama imports from those
Turns = Sequence[tuple[str, str]]  # role and content

# Words that no template writes: what stands around them is the template's.
_ONE, _TWO, _ANSWER, _RULE = "Firstquestion", "Secondquestion", "Firstanswer", "Systemrule"
_CHECKED: tuple[Turns, ...] = (
    ((USER, "What is 2 + 2?\nSay it in a word."),),
    ((USER, "Hi"), (ASSISTANT, "Hello.\n\nHow are you?"), (USER, "Well {{ and }} you?")),
    ((USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d"), (USER, "e")),
)
_BLANKS: Turns = ((USER, " a \n"), (ASSISTANT, " b\n"), (USER, "\nc"))
_RULES = (SYSTEM, "You are brief.\nAnd kind.")


class NotExpressible(Exception):
    """Why there is no Modelfile, as a sentence without its period."""


@dataclass(frozen=True)
class Layout:
    """What a chat template writes around the contents of turns."""

    start: str  # before the first turn, where no system message comes first
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str
    ending: str  # behind all turns, where the answer is asked for
    before_system: str | None  # with what stands at the very beginning; None where system messages are refused
    after_system: str = ""

    @classmethod
    def of(cls, template: ChatTemplate) -> "Layout":
        """That of a template; NotExpressible where it writes something else of other conversations."""
        head, between, back, tail = _around(template, [(USER, _ONE), (ASSISTANT, _ANSWER), (USER, _TWO)])
        before_user = _shared_start(head[::-1], back[::-1])[::-1]
        after_user = _shared_start(between, tail)
        parts: dict[str, Any] = {
            "start": head.removesuffix(before_user),
            "before_user": before_user,
            "after_user": after_user,
            "before_answer": between.removeprefix(after_user),
            "after_answer": back.removesuffix(before_user),
            "ending": tail.removeprefix(after_user),
        }
        try:
            before_system, between, _ = _around(template, [(SYSTEM, _RULE), (USER, _ONE)])
        except ValueError:  # some templates know no system messages
            layout = cls(**parts, before_system=None)
        else:
            if not between.endswith(before_user):
                raise NotExpressible("the chat template writes a system message into the question behind it")
            layout = cls(**parts, before_system=before_system, after_system=between.removesuffix(before_user))
        for turns in (*_CHECKED, *((_RULES, *turns) for turns in _CHECKED if layout.before_system is not None)):
            if layout.render(turns) != template.render(_messages(turns), prompt=True):
                raise NotExpressible("the chat template trims or rewrites turns, which Ollama's template cannot")
        return layout

    def render(self, turns: Turns) -> str:
        """What the Go template writes of a conversation that ends with a question."""
        text = "" if turns[0][0] == SYSTEM else self.start
        for role, content in turns:
            before, after = {
                SYSTEM: (self.before_system or "", self.after_system),
                USER: (self.before_user, self.after_user),
                ASSISTANT: (self.before_answer, self.after_answer),
            }[role]
            text += before + content + after
        return text + self.ending

    def without(self, bos: str) -> "Layout":
        """The same without a first token that the runtime itself puts before a text."""
        parts = dict(vars(self))
        for name in ("start", "before_system"):
            if parts[name] is not None:
                parts[name] = parts[name].removeprefix(bos)
        return Layout(**parts)

    def as_go(self) -> str:
        """The Go template."""
        lines = ["{{- range $number, $message := .Messages }}"]
        if self.start:
            lines.append(f'{{{{- if and (eq $number 0) (ne $message.Role "system") }}}}{_go(self.start)}{{{{- end }}}}')
        if self.before_system is not None:
            lines.append('{{- if eq $message.Role "system" }}' + _turn(self.before_system, self.after_system))
        started = "{{- else if" if self.before_system is not None else "{{- if"
        lines.append(f'{started} eq $message.Role "user" }}}}' + _turn(self.before_user, self.after_user))
        lines.append('{{- else if eq $message.Role "assistant" }}' + _turn(self.before_answer, self.after_answer))
        return "\n".join([*lines, "{{- end }}", "{{- end }}" + _go(self.ending)])


def modelfile(model: Any, tokenizer: Any, source: str) -> str:
    """The Modelfile of a language model whose weights are `source`, as FROM names them; NotExpressible says why not."""
    kind = model.config.model_type
    if source == FOLDER and kind not in ARCHITECTURES:
        raise NotExpressible(f"Ollama imports no model of the type {kind!r} (but {', '.join(ARCHITECTURES)})")
    encoder = ConversationEncoder(tokenizer)
    try:
        template = ChatTemplate(tokenizer, lambda text: [])
        layout = Layout.of(template)
    except ValueError as error:
        raise NotExpressible(str(error)) from error
    before = "".join(tokenizer.convert_ids_to_tokens(prefix_of(tokenizer)))
    if before and not all(text is None or text.startswith(before) for text in (layout.start, layout.before_system)):
        raise NotExpressible(f"Ollama puts {before!r} before a prompt, and the chat template does not")
    stops = list(tokenizer.convert_ids_to_tokens(sorted(eos_ids_of(model, encoder))))
    if encoder.format.kind == GUANACO:
        stops.append(HUMAN_HEADER)  # another turn begins
    if quoted := next((stop for stop in stops if '"' in stop), None):
        raise NotExpressible(f"an answer ends with {quoted!r}, and a Modelfile has no quotes within quotes")
    positions = max_positions(model.config)
    parameters = [*(f'stop "{stop}"' for stop in stops), "temperature 0"]
    parameters += ["repeat_penalty 1", *([f"num_ctx {positions}"] if positions else [])]
    trims = layout.render(_BLANKS) != template.render(_messages(_BLANKS), prompt=True)
    return "\n".join(
        [
            f"FROM {source}",
            *(["# the run's template takes blanks off both ends of a content; this one leaves them"] if trims else []),
            f'TEMPLATE """{layout.without(before).as_go()}"""',
            "# greedy, as it was evaluated; Ollama's own defaults draw, and penalize what stands in the prompt",
            *(f"PARAMETER {parameter}" for parameter in parameters),
            "",
        ]
    )


def _around(template: ChatTemplate, turns: Turns) -> list[str]:
    """What a template writes before, between and after the contents of turns."""
    parts, rest = list[str](), template.render(_messages(turns), prompt=True)
    for _, content in turns:
        if rest.count(content) != 1:
            raise NotExpressible("the chat template does not write each turn once")
        before, rest = rest.split(content)
        parts.append(before)
    return [*parts, rest]


def _shared_start(one: str, other: str) -> str:
    end = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[: min(len(one), len(other)) if end is None else end]


def _messages(turns: Turns) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def _turn(before: str, after: str) -> str:
    return f"{_go(before)}{{{{ $message.Content }}}}{_go(after)}"


def _go(text: str) -> str:
    """A text as a string constant of Go, so that no blank is trimmed and no brace read; empty where it is."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
