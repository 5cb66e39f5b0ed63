"""What every feature is counted from: a text's words, lemmas and marks, found once, without any downloaded table.

Words come from NLTK's RegexpTokenizer, which needs no data; stop words are scikit-learn's, English lemmas simplemma's.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import simplemma
from nltk.tokenize import RegexpTokenizer
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

# A Chinese or Japanese character is a word of its own: those texts have no spaces to split at.
IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff"
WORDS = RegexpTokenizer(rf"[{IDEOGRAPH}]|[^\W_{IDEOGRAPH}]+(?:['’][^\W\d_]+)?")
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SCRIPTS = ((0x0000, 0x024F), (0x0400, 0x052F), (0x3040, 0xD7AF))  # Latin, Cyrillic, Chinese-Japanese-Korean, others
SHORTEST_ZIPPED = 30  # bytes; zlib's own header would dominate shorter texts


@lru_cache(maxsize=200_000)
def lemma(word: str) -> str:
    """The English lemma of a word in lower case; other languages' words mostly stay as they are."""
    return simplemma.lemmatize(word, lang="en").lower()


@dataclass(frozen=True)
class Text:
    """A text and what is counted from it; each property is computed when it is first asked for."""

    text: str
    words: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(WORDS.tokenize(self.text.lower())))

    @cached_property
    def lemmas(self) -> tuple[str, ...]:
        """A lemma a word."""
        return tuple(lemma(word) for word in self.words)

    @cached_property
    def content(self) -> tuple[str, ...]:
        """Lemmas that are no stop words, in order."""
        return tuple(
            each
            for each, word in zip(self.lemmas, self.words, strict=True)
            if each not in ENGLISH_STOP_WORDS and word not in ENGLISH_STOP_WORDS
        )

    @cached_property
    def content_set(self) -> frozenset[str]:
        """The different lemmas that are no stop words."""
        return frozenset(self.content)

    @cached_property
    def pairs(self) -> frozenset[tuple[str, ...]]:
        """The different pairs of neighbouring lemmas."""
        return frozenset(runs(self.lemmas, 2))

    @cached_property
    def triples(self) -> tuple[tuple[str, ...], ...]:
        """Every run of three lemmas, in order."""
        return tuple(runs(self.lemmas, 3))

    @cached_property
    def numbers(self) -> frozenset[str]:
        """The different numbers written in digits."""
        return frozenset(NUMBER.findall(self.text))

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """Pieces that end with a full stop, question or exclamation mark, or with their line."""
        return tuple(piece.strip() for piece in SENTENCE_END.split(self.text) if piece.strip())

    @cached_property
    def scripts(self) -> np.ndarray:
        """Shares of letters in each of SCRIPTS and in others: float64 [4], zeros for a text without letters."""
        points = np.array([ord(character) for character in self.text if character.isalpha()], np.int64)
        counts = [int(((points >= low) & (points <= high)).sum()) for low, high in SCRIPTS]
        return np.array([*counts, len(points) - sum(counts)]) / max(len(points), 1)

    @cached_property
    def zipped_share(self) -> float:
        """Bytes after zlib for each byte before: low for a text that repeats itself."""
        raw = self.text.encode()
        return len(zlib.compress(raw)) / max(len(raw), SHORTEST_ZIPPED)


def runs(items: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """Every run of `length` neighbours."""
    return list(zip(*(items[start:] for start in range(length)), strict=False))
