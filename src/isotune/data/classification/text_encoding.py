"""From texts to tokens for a classifier: the tokenizer's own special tokens around each, within max_seq_length."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np

from isotune.data.documents import Documents
from isotune.data.fingerprint import digest
from isotune.data.tokenizer import FastTokenizer, add_special_tokens
from isotune.io.errors import UserError

OverlongText = Literal["head", "tail", "head_tail"]
HEAD_SHARE = 4  # head_tail keeps a quarter from the start: 128 of 510, as Sun et al. 2019 found best for IMDb


class TextEncoder:
    """A tokenizer made ready to turn texts into `[CLS] ... [SEP]`, or whatever it puts around a text.

    An empty text becomes the special tokens alone.

    Attributes:
        prefix, suffix: int32 [tokens that the tokenizer puts before and after a text].
        fingerprint: hexadecimal digest of everything that decides the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Copy the Rust tokenizer inside a `transformers` tokenizer, and leave the original as it is.

        Raises:
            UserError: it has no Rust tokenizer, or puts no token before a text, which is the one a classifier reads.
        """
        fast = FastTokenizer(tokenizer)
        self.prefix, self.suffix = fast.prefix, fast.suffix
        if not len(self.prefix):
            raise UserError(
                f"the tokenizer {fast.name} puts no special token before a text, and a classifier reads that one: "
                "choose an encoder's, such as BERT's"
            )
        self.fingerprint = digest(fast.definition, self.prefix.tolist(), self.suffix.tolist())
        self._backend = fast.backend

    @property
    def special_tokens(self) -> int:
        """Tokens that every text gets beside its own."""
        return len(self.prefix) + len(self.suffix)

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text alone, int32, whole and without special tokens."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode(
        self, texts: Sequence[str], max_seq_length: int, overlong: OverlongText, labels: np.ndarray | None = None
    ) -> Documents:
        """Tokenize texts on all cores at once, and cut what is longer than `max_seq_length` tokens.

            head        C 1 2 3 4 S          the first that fit
            tail        C 5 6 7 8 S          the last
            head_tail   C 1 6 7 8 S          a quarter from the start, the rest from the end

        Args:
            labels: int32 [texts]; class 0 for all where nobody knows them.

        Returns:
            Documents with the column `whole_lengths`, the tokens of each before anything was cut, int64.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        own = np.fromiter((len(e.ids) for e in encodings), np.int64, len(encodings))
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, int(own.sum()))
        room = max_seq_length - self.special_tokens
        first = {"head": room, "tail": 0, "head_tail": room // HEAD_SHARE}[overlong]
        position = np.arange(len(ids)) - np.repeat(np.cumsum(own) - own, own)
        whole = np.repeat(own, own)
        kept = (whole <= room) | (position < first) | (position >= whole - (room - first))
        input_ids, starts, _ = add_special_tokens(ids[kept], np.minimum(own, room), self.prefix, self.suffix)
        return Documents(
            input_ids=input_ids,
            targets=np.zeros(len(texts), np.int32) if labels is None else labels,
            starts=starts,
            source_rows=np.arange(len(texts)),
            columns={"whole_lengths": own + self.special_tokens},
        )
