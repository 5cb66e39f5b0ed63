"""Answers of a language model in OpenAI's form: at once, or as a stream of server-sent events."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from isotune import __version__
from isotune.serving.generation.service import Answer
from isotune.serving.limits import Refused

DONE = "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def failure(refused: Refused) -> str:
    """The event that ends a stream which cannot go on."""
    return event(refused.as_json())


@dataclass(frozen=True)
class Form:
    """The form of one answer, of a chat or of texts that are gone on with."""

    model: str
    is_chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _content(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind, prefix = ("chat.completion", "chatcmpl") if self.is_chat else ("text_completion", "cmpl")
        return {
            "id": f"{prefix}-{self.id}",
            "object": f"{kind}.chunk" if chunk and self.is_chat else kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"isotune-{__version__}",
            "choices": choices,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All answers, with the numbers of tokens."""
        choices = [self._choice(number, answer.text, answer.finish) for number, answer in enumerate(answers)]
        return self._content(choices, chunk=False) | {"usage": usage(answers)}

    def _choice(self, number: int, text: str, finish: str) -> dict[str, Any]:
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        )
        return {"index": number, **said, "logprobs": None, "finish_reason": finish}

    def begin(self) -> str:
        """The first event of a chat, which names who speaks."""
        return self._chunk(0, {"role": "assistant", "content": ""}, None)

    def piece(self, number: int, text: str) -> str:
        """Further text of a choice."""
        return self._chunk(number, {"content": text}, None)

    def end(self, number: int, answer: Answer) -> str:
        """The last event of a choice."""
        return self._chunk(number, {}, answer.finish)

    def _chunk(self, number: int, delta: dict[str, Any], finish: str | None) -> str:
        said = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = {"index": number, **said, "logprobs": None, "finish_reason": finish}
        return event(self._content([choice], chunk=True))

    def usage(self, answers: Sequence[Answer]) -> str:
        """The event with the numbers of tokens, where it is asked for."""
        return event(self._content([], chunk=True) | {"usage": usage(answers)})


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """The numbers of tokens that were read and generated; an eos is not counted."""
    read, made = sum(answer.prompt_tokens for answer in answers), sum(answer.tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
