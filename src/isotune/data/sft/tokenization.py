"""From conversations to tokens with their mask, by the character offsets of the answers.

No template token is ever searched for: `### Assistant:` becomes other tokens after a space than after a line end.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from isotune.data.documents import Documents, starts_of, sums_of
from isotune.data.fingerprint import digest
from isotune.data.sft.conversations import Conversation
from isotune.data.sft.offsets import LocatedTokens, TokenLocator
from isotune.data.tokenizer import FastTokenizer
from isotune.io.errors import UserError


class ConversationEncoder:
    """A tokenizer made ready to turn conversations into supervised tokens.

    A token is supervised when its characters overlap an answer. So `Ġanswer`, which begins with the space after the
    colon, is supervised, and so is a token that straddles an answer's edge, such as `::` where an answer begins with a
    colon; those are counted. A token that stands for no character at all is not supervised.

    Each text is closed by one supervised eos. Should a vocabulary yield its eos for ordinary text all the same, that
    token is not supervised.

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
        fast = FastTokenizer(tokenizer)
        for role in ("eos", "pad"):
            if getattr(tokenizer, f"{role}_token_id", None) is None:
                raise UserError(
                    f"the tokenizer {fast.name} has no {role} token: set {role}_token in its tokenizer_config.json"
                )
        self.prefix = fast.prefix
        self.eos_token_id = int(tokenizer.eos_token_id)
        self.fingerprint = digest(fast.definition, self.prefix.tolist(), self.eos_token_id)
        self._backend = fast.backend
        self._eos_token = str(tokenizer.eos_token)

    @cached_property
    def _locator(self) -> TokenLocator:
        """Made when there is something to tokenize: prepared data need only the fingerprint."""
        return TokenLocator(self._backend)

    def encode(self, conversations: Sequence[Conversation], source_rows: np.ndarray | None = None) -> Documents:
        """Tokenize conversations that have an answer each; the texts run on all cores at once, in Rust.

        Args:
            source_rows: int64 [conversations]; by default their numbers.

        Returns:
            Documents, whole, without the prefix. Their columns are `straddling_tokens`, the supervised tokens that
            also cover characters outside an answer, and `special_texts`, whether somebody wrote out the eos token.
        """
        texts = [conversation.text for conversation in conversations]
        tokens = self._locator.locate(texts)
        answered_until = _answered_until(conversations, tokens)
        answered = answered_until[tokens.ends] - answered_until[tokens.begins]
        supervised = (answered > 0) & (tokens.ids != self.eos_token_id)
        straddling = supervised & (answered < tokens.ends - tokens.begins)
        ends = np.cumsum(tokens.counts)
        return Documents(
            input_ids=np.insert(tokens.ids, ends, self.eos_token_id),
            targets=np.insert(supervised, ends, True),
            starts=starts_of(tokens.counts + 1),
            source_rows=np.arange(len(texts)) if source_rows is None else source_rows,
            columns={
                "straddling_tokens": sums_of(straddling, starts_of(tokens.counts)),
                "special_texts": np.array([self._eos_token in text for text in texts], bool),
            },
        )


def _answered_until(conversations: Sequence[Conversation], tokens: LocatedTokens) -> np.ndarray:
    """How much of the joined texts before each place belongs to answers: int64 [bytes or characters + 1]."""
    edges = np.zeros(int(tokens.text_starts[-1]) + 1, np.int8)
    for number, conversation in enumerate(conversations):
        for start, end in conversation.answers:
            # Answers never touch, because a header stands between them: no place is an edge twice.
            edges[tokens.position(number, conversation.text, start)] += 1
            edges[tokens.position(number, conversation.text, end)] -= 1
    return starts_of(np.cumsum(edges[:-1], dtype=np.int8))
