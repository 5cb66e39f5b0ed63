"""A tokenizer's Rust backend, made ready to tokenize texts of any length without touching the original.

What a classifier reads is made here too: the tokenizer's own special tokens around each text, within max_seq_length.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from isotune.config.recipes import OverlongText
from isotune.data.documents import Documents, digest, starts_of
from isotune.io.errors import UserError

HEAD_SHARE = 4  # head_tail keeps a quarter from the start: 128 of 510, as Sun et al. 2019 found best for IMDb


def tokenizer_name(tokenizer: Any) -> str:
    """How messages name a tokenizer: its folder or Hub id, else its class."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


class FastTokenizer:
    """A private copy of a tokenizer's Rust backend that neither cuts nor pads.

    A special token written out in a text, such as `</s>`, is encoded like any other characters and never becomes the
    special token.

    UserError where the tokenizer, of `transformers`, has no Rust backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.name = tokenizer_name(tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer {self.name} has no fast form: save its tokenizer.json")
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        probe = self.backend.encode("a", add_special_tokens=True)
        own = np.flatnonzero(np.array(probe.special_tokens_mask) == 0)
        self.prefix = np.array(probe.ids[: own[0]], np.int32)  # what the tokenizer puts before a text
        self.suffix = np.array(probe.ids[own[-1] + 1 :], np.int32)
        self.definition = str(self.backend.to_str())  # for fingerprints
        self.backend.post_processor = None  # which would trim offsets of their leading space
        self.backend.encode_special_tokens = True


def add_special_tokens(
    input_ids: np.ndarray, lengths: np.ndarray, prefix: np.ndarray, suffix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put a prefix before and a suffix after each text: of `lengths` tokens, int64 [texts], end to end in `input_ids`.

    Returns int32 input_ids with them; starts, int64 [texts + 1]; and where each own token of a text went, int64.
    """
    special = len(prefix) + len(suffix)
    starts = starts_of(lengths + special)
    places = np.arange(len(input_ids)) + np.repeat(np.arange(len(lengths)) * special + len(prefix), lengths)
    out = np.empty(int(starts[-1]), np.int32)
    out[places] = input_ids
    for offset, token in enumerate(prefix.tolist()):
        out[starts[:-1] + offset] = token
    for offset, token in enumerate(reversed(suffix.tolist()), start=1):
        out[starts[1:] - offset] = token
    return out, starts, places


class TextEncoder(FastTokenizer):
    """A tokenizer made ready to turn texts into `[CLS] ... [SEP]`, or whatever it puts around a text.

    An empty text becomes the special tokens alone. `fingerprint` is a digest of everything that decides the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        if not len(self.prefix):
            raise UserError(
                f"the tokenizer {self.name} puts no special token before a text, and a classifier reads that one: "
                "choose an encoder's, such as BERT's"
            )
        self.fingerprint = digest(self.definition, self.prefix.tolist(), self.suffix.tolist())
        self.special_tokens = len(self.prefix) + len(self.suffix)  # that every text gets beside its own

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text alone, int32, whole and without special tokens; on all cores at once."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode(
        self, texts: Sequence[str], max_seq_length: int, overlong: OverlongText, labels: np.ndarray | None = None
    ) -> Documents:
        """Tokenize texts, and cut what is longer than `max_seq_length` tokens.

            head        C 1 2 3 4 S          the first that fit
            tail        C 5 6 7 8 S          the last
            head_tail   C 1 6 7 8 S          a quarter from the start, the rest from the end

        `labels` are int32 [texts]; class 0 for all where nobody knows them. The documents have the column
        `whole_lengths`, the tokens of each before anything was cut, int64.
        """
        tokens = self.tokens(texts)
        own = np.array([len(ids) for ids in tokens], np.int64)
        room = max_seq_length - self.special_tokens
        first = {"head": room, "tail": 0, "head_tail": room // HEAD_SHARE}[overlong]
        position = np.arange(int(own.sum())) - np.repeat(np.cumsum(own) - own, own)
        whole = np.repeat(own, own)
        kept = (whole <= room) | (position < first) | (position >= whole - (room - first))
        ids = np.concatenate(tokens)[kept]
        input_ids, starts, _ = add_special_tokens(ids, np.minimum(own, room), self.prefix, self.suffix)
        return Documents(
            input_ids=input_ids,
            targets=np.zeros(len(texts), np.int32) if labels is None else labels,
            starts=starts,
            source_rows=np.arange(len(texts)),
            columns={"whole_lengths": own + self.special_tokens},
        )
