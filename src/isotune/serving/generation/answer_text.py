"""The text of an answer while it grows: only what no later token can change is handed on.

Held back are the bytes of an unfinished character, white space at the end, what may become the header of another turn
or a stop word, and reasoning, which belongs to no answer. So the pieces add up to the answer that is given at once.
"""

import re

from isotune.data.sft.conversations import REASONING_CLOSES, REASONING_OPENS, header_start
from isotune.evaluation.models import GenerationModel

_MAY_BE_HEADER = re.compile(r"#+ ?[A-Za-z]{0,9}$")
_UNFINISHED = "\ufffd"  # what an unfinished character is decoded as


class AnswerText:
    """The text of one answer; with `prompt` the answer to a conversation, else a text that is gone on with."""

    def __init__(self, lm: GenerationModel, stop: tuple[str, ...] = (), prompt: str | None = None) -> None:
        self.lm, self.stop, self.prompt = lm, stop, prompt
        self.sent = ""  # what has been handed on
        self._tokens = list[int]()

    def restart(self) -> None:
        """Begin again with the first token; what has been handed on stays so."""
        self._tokens = []

    def keep(self, token: int) -> None:
        """Take a token whose text nobody waits for."""
        self._tokens.append(token)

    def add(self, token: int) -> tuple[str, bool]:
        """The text that is certain now and was not before, and whether a stop word has come."""
        self.keep(token)
        whole, stopped = self._stopped(self._certain(self._decoded()))
        lengths = ((word, range(1, min(len(word), len(whole) + 1))) for word in self.stop)
        held = max((n for word, own in lengths for n in own if whole.endswith(word[:n])), default=0)
        certain = whole if stopped else whole[: len(whole) - held]
        return self._new(certain if self.prompt is None else certain.rstrip()), stopped

    def finish(self) -> tuple[str, str]:
        """The rest of the answer, and the whole of it."""
        text = self._decoded()
        whole, _ = self._stopped(text if self.prompt is None else self.lm.encoder.answer_in(text, self.prompt))
        whole = whole if self.prompt is None else whole.rstrip()
        return self._new(whole), whole

    def _decoded(self) -> str:
        return self.lm.tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _new(self, certain: str) -> str:
        if len(certain) <= len(self.sent):
            return ""
        if not certain.startswith(self.sent):
            raise RuntimeError("the answer is another one than its beginning, which was sent")
        piece, self.sent = certain[len(self.sent) :], certain
        return piece

    def _stopped(self, text: str) -> tuple[str, bool]:
        """The text before the first stop word, and whether there is one."""
        places = [place for word in self.stop if (place := text.find(word)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _certain(self, text: str) -> str:
        """The beginning of the answer that stays, whatever follows `text`."""
        text = text.rstrip(_UNFINISHED)
        if self.prompt is None:
            return text
        if self.lm.encoder.template is None:
            header = header_start(text)
            text = _MAY_BE_HEADER.sub("", text) if header is None else text[:header]
        text = text.lstrip()
        may_open = REASONING_OPENS.startswith(text[: len(REASONING_OPENS)])
        if text and (may_open or self.prompt.rstrip().endswith(REASONING_OPENS)):
            _, closed, text = text.partition(REASONING_CLOSES)
            return text.lstrip() if closed else ""
        return text
