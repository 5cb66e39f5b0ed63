"""Where each token stands in its text, for a batch of texts at once.

A byte-level vocabulary (GPT-2, OPT, Llama 3, Qwen) splits the UTF-8 bytes of a text into tokens without changing any,
so the running total of the tokens' byte counts gives their offsets. That halves the cost: character offsets from the
tokenizer take as long again as tokenization. For any other vocabulary the tokenizer's own offsets are used.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from isotune.data.documents import starts_of


@dataclass(frozen=True)
class LocatedTokens:
    """The tokens of texts that lie end to end, and where each stands in them.

    Attributes:
        ids: int32 [tokens].
        counts: int64 [texts]; tokens of each text.
        begins, ends: int64 [tokens]; half-open, in bytes or in characters of the joined texts.
        text_starts: int64 [texts + 1]; in the same unit.
        in_bytes: whether that unit is the byte of UTF-8, else the character.
    """

    ids: np.ndarray
    counts: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    text_starts: np.ndarray
    in_bytes: bool

    def position(self, number: int, text: str, character: int) -> int:
        """Where a character of text `number` stands in the joined texts."""
        within = len(text[:character].encode()) if self.in_bytes and not text.isascii() else character
        return int(self.text_starts[number]) + within


class TokenLocator:
    """A Rust tokenizer that returns tokens with their offsets.

    Args:
        backend: without truncation, padding and post-processor, so that nothing but the text becomes tokens.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._bytes_of_token = _bytes_of_tokens(backend)

    def locate(self, texts: Sequence[str]) -> LocatedTokens:
        """Tokenize texts, on all cores at once, with the offsets of their tokens."""
        return self._by_bytes(texts) or self.by_characters(texts)

    def by_characters(self, texts: Sequence[str]) -> LocatedTokens:
        """The tokenizer's own offsets; correct for any vocabulary."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        ids, counts = _flat([encoding.ids for encoding in encodings])
        pairs = chain.from_iterable(encoding.offsets for encoding in encodings)
        offsets = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(ids)).reshape(-1, 2)
        text_starts = np.cumsum([0, *map(len, texts)])
        offsets += np.repeat(text_starts[:-1], counts)[:, None]
        return LocatedTokens(ids, counts, offsets[:, 0], offsets[:, 1], text_starts, in_bytes=False)

    def _by_bytes(self, texts: Sequence[str]) -> LocatedTokens | None:
        """Offsets from the tokens' byte counts, or None where those do not add up to every text's own."""
        if self._bytes_of_token is None:
            return None
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids, counts = _flat([encoding.ids for encoding in encodings])
        sizes = self._bytes_of_token[ids]
        until = starts_of(sizes)
        text_starts = np.cumsum([0, *(len(text) if text.isascii() else len(text.encode()) for text in texts)])
        if not np.array_equal(until[starts_of(counts)], text_starts):
            return None
        return LocatedTokens(ids, counts, until[:-1], until[1:], text_starts, in_bytes=True)


def _flat(ids_of_texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.fromiter(map(len, ids_of_texts), np.int64, len(ids_of_texts))
    return np.fromiter(chain.from_iterable(ids_of_texts), np.int32, int(counts.sum())), counts


def _bytes_of_tokens(backend: Tokenizer) -> np.ndarray | None:
    """Bytes of text that each token stands for, int64 [vocabulary], or None where they cannot be known."""
    if backend.normalizer is not None or not _cuts_bytes(backend):
        return None
    alphabet = set(ByteLevel.alphabet())
    sizes = np.zeros(backend.get_vocab_size(with_added_tokens=True), np.int64)
    added = backend.get_added_tokens_decoder()
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if number >= len(sizes):
            return None
        if number in added:
            sizes[number] = len(token.encode())
        elif alphabet.issuperset(token):
            sizes[number] = len(token)  # each character of this alphabet stands for one byte
        else:
            return None
    return sizes


def _cuts_bytes(backend: Tokenizer) -> bool:
    whole: dict[str, Any] = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
    steps: list[dict[str, Any]] = whole.get("pretokenizers", [whole])
    return steps[-1].get("type") == "ByteLevel" and not any(step.get("add_prefix_space") for step in steps)
