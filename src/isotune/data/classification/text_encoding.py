"""From texts to tokens for a classifier: the tokenizer's own special tokens around each, within max_seq_length."""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from isotune.io.errors import UserError

OverlongText = Literal["head", "tail", "head_tail"]
HEAD_SHARE = 4  # head_tail keeps a quarter from the start: 128 of 510, as Sun et al. 2019 found best for IMDb


@dataclass(frozen=True)
class EncodedTexts:
    """A batch of texts as tokens, special tokens in place.

    Attributes:
        input_ids: int32 [tokens].
        lengths: int64 [texts]; tokens of each, at most max_seq_length.
        whole_lengths: int64 [texts]; the same before anything was cut.
        empty: texts without any token of their own.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    whole_lengths: np.ndarray
    empty: int


class TextEncoder:
    """A tokenizer made ready to turn texts into `[CLS] ... [SEP]`, or whatever it puts around a text.

    A special token written out in a text, such as `[SEP]`, is encoded like any other characters and never becomes the
    special token. An empty text becomes the special tokens alone.

    Attributes:
        prefix, suffix: int32 [tokens that the tokenizer puts before and after a text].
        fingerprint: hexadecimal digest of everything that decides the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Copy the Rust tokenizer inside a `transformers` tokenizer, and leave the original as it is.

        Raises:
            UserError: it has no Rust tokenizer, or puts no token before a text, which is the one a classifier reads.
        """
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer {name} has no fast form: save its tokenizer.json")
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        probe = backend.encode("a", add_special_tokens=True)
        own = np.flatnonzero(np.array(probe.special_tokens_mask) == 0)
        self.prefix = np.array(probe.ids[: own[0]], np.int32)
        self.suffix = np.array(probe.ids[own[-1] + 1 :], np.int32)
        if not len(self.prefix):
            raise UserError(
                f"the tokenizer {name} puts no special token before a text, and a classifier reads that one: "
                "choose an encoder's, such as BERT's"
            )
        self.fingerprint = hashlib.sha256(
            json.dumps([backend.to_str(), self.prefix.tolist(), self.suffix.tolist()]).encode()
        ).hexdigest()
        backend.encode_special_tokens = True
        self._backend = backend

    @property
    def special_tokens(self) -> int:
        """Tokens that every text gets beside its own."""
        return len(self.prefix) + len(self.suffix)

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text alone, int32, whole and without special tokens."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode(self, texts: Sequence[str], max_seq_length: int, overlong: OverlongText) -> EncodedTexts:
        """Tokenise texts on all cores at once, and cut what is longer than `max_seq_length` tokens.

        head        C 1 2 3 4 S          the first that fit
        tail        C 5 6 7 8 S          the last
        head_tail   C 1 6 7 8 S          a quarter from the start, the rest from the end
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        own = np.fromiter((len(e.ids) for e in encodings), np.int64, len(encodings))
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, int(own.sum()))
        room = max_seq_length - self.special_tokens
        first = {"head": room, "tail": 0, "head_tail": room // HEAD_SHARE}[overlong]
        position = np.arange(len(ids)) - np.repeat(np.cumsum(own) - own, own)
        whole = np.repeat(own, own)
        ids = ids[(whole <= room) | (position < first) | (position >= whole - (room - first))]
        kept = np.minimum(own, room)
        lengths = kept + self.special_tokens
        starts = np.cumsum(lengths) - lengths
        around = np.arange(len(kept)) * self.special_tokens + len(self.prefix)
        out = np.empty(int(lengths.sum()), np.int32)
        out[np.arange(len(ids)) + np.repeat(around, kept)] = ids
        for offset, token in enumerate(self.prefix.tolist()):
            out[starts + offset] = token
        for offset, token in enumerate(self.suffix.tolist()):
            out[starts + len(self.prefix) + kept + offset] = token
        return EncodedTexts(out, lengths, own + self.special_tokens, int((own == 0).sum()))
