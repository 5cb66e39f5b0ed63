"""From conversations to tokens with their mask, by the character offsets of the answers.

No template token is ever searched for: `### Assistant:` becomes other tokens after a space than after a line end.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from isotune.data.sft.conversations import Conversation
from isotune.data.sft.offsets import LocatedTokens, TokenLocator
from isotune.io.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """A batch of whole texts as tokens, closed by the eos and without what the tokenizer prepends.

    Attributes:
        input_ids: int32 [tokens].
        supervised: bool [tokens].
        starts: int64 [texts + 1].
        straddling_tokens: supervised tokens that also cover characters outside an answer.
        special_texts: texts in which somebody wrote out the eos token.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    straddling_tokens: int
    special_texts: int


class ConversationEncoder:
    """A tokenizer made ready to turn conversations into supervised tokens.

    A token is supervised when its characters overlap an answer. So `Ġanswer`, which begins with the space after the
    colon, is supervised, and so is a token that straddles an answer's edge, such as `::` where an answer begins with a
    colon; those are counted. A token that stands for no character at all is not supervised.

    Each text is closed by one supervised eos. A special token written out in a text, such as `</s>`, is encoded like
    any other characters and never becomes the special token; should a vocabulary yield its eos for ordinary text all
    the same, that token is not supervised.

    Attributes:
        prefix: int32 [tokens that the tokenizer prepends]: the bos for OPT and Llama, nothing for others.
        eos_token_id: closes every text.
        fingerprint: hexadecimal digest of everything that decides the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Copy the Rust tokenizer inside a `transformers` tokenizer, and leave the original as it is.

        Raises:
            UserError: it has no eos, no pad, or no Rust tokenizer.
        """
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        for role in ("eos", "pad"):
            if getattr(tokenizer, f"{role}_token_id", None) is None:
                raise UserError(
                    f"the tokenizer {name} has no {role} token: set {role}_token in its tokenizer_config.json"
                )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer {name} gives no character offsets: save its fast form, tokenizer.json")
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        probe = backend.encode("a", add_special_tokens=True)
        first_of_text = probe.special_tokens_mask.index(0)
        self.prefix = np.array(probe.ids[:first_of_text], np.int32)
        self.eos_token_id = int(tokenizer.eos_token_id)
        self.fingerprint = _digest(backend.to_str(), self.prefix.tolist(), self.eos_token_id)
        # The prefix is added after cutting; without a post-processor no offset is trimmed of its leading space.
        backend.post_processor = None
        backend.encode_special_tokens = True
        self._backend = backend
        self._eos_token = str(tokenizer.eos_token)

    @cached_property
    def _locator(self) -> TokenLocator:
        """Made when there is something to tokenise: prepared data need only the fingerprint."""
        return TokenLocator(self._backend)

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """Tokenise conversations that have an answer each; the texts run on all cores at once, in Rust."""
        texts = [conversation.text for conversation in conversations]
        tokens = self._locator.locate(texts)
        answered_until = _answered_until(conversations, tokens)
        answered = answered_until[tokens.ends] - answered_until[tokens.begins]
        supervised = (answered > 0) & (tokens.ids != self.eos_token_id)
        straddling = supervised & (answered < tokens.ends - tokens.begins)

        ends = np.cumsum(tokens.counts)
        return Encoded(
            input_ids=np.insert(tokens.ids, ends, self.eos_token_id),
            supervised=np.insert(supervised, ends, True),
            starts=np.concatenate([np.zeros(1, np.int64), ends + np.arange(1, len(ends) + 1)]),
            straddling_tokens=int(straddling.sum()),
            special_texts=sum(self._eos_token in text for text in texts),
        )


def _answered_until(conversations: Sequence[Conversation], tokens: LocatedTokens) -> np.ndarray:
    """How much of the joined texts before each place belongs to answers: int64 [bytes or characters + 1]."""
    edges = np.zeros(int(tokens.text_starts[-1]) + 1, np.int8)
    for number, conversation in enumerate(conversations):
        for start, end in conversation.answers:
            # Answers never touch, because a header stands between them: no place is an edge twice.
            edges[tokens.position(number, conversation.text, start)] += 1
            edges[tokens.position(number, conversation.text, end)] -= 1
    in_answer = np.cumsum(edges[:-1], dtype=np.int8)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(in_answer, dtype=np.int64)])


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
