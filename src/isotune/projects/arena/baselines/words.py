"""Words, lemmas, n-grams and sentences of a text, from which all features are computed; nothing is downloaded.

Words come from NLTK's RegexpTokenizer, which needs no data, stop words from scikit-learn, lemmas from simplemma.
"""

import re
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import simplemma
from nltk.tokenize import RegexpTokenizer
from nltk.util import ngrams
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

# each Chinese or Japanese character counts as a word: these texts have no spaces to split at
IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff"
WORDS = RegexpTokenizer(rf"[{IDEOGRAPH}]|[^\W_{IDEOGRAPH}]+(?:['’][^\W\d_]+)?")
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SCRIPTS = ((0x0000, 0x024F), (0x0400, 0x052F), (0x3040, 0xD7AF))  # Latin, Cyrillic, Chinese-Japanese-Korean, others
MIN_ZLIB_BYTES = 30  # zlib's own header would dominate shorter texts


@lru_cache(maxsize=200_000)
def lemma(word: str) -> str:
    """The English lemma of a lower-case word; words of other languages mostly stay unchanged."""
    return simplemma.lemmatize(word, lang="en").lower()


@dataclass(frozen=True)
class Text:
    """A text and its linguistic units, each computed on first access."""

    text: str

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words in lower case."""
        return tuple(WORDS.tokenize(self.text.lower()))

    @cached_property
    def lemmas(self) -> tuple[str, ...]:
        """The lemma of each word."""
        return tuple(lemma(word) for word in self.words)

    @cached_property
    def content(self) -> tuple[str, ...]:
        """The lemmas in order, without stop words."""
        return tuple(
            lemma
            for lemma, word in zip(self.lemmas, self.words, strict=True)
            if lemma not in ENGLISH_STOP_WORDS and word not in ENGLISH_STOP_WORDS
        )

    @cached_property
    def content_set(self) -> frozenset[str]:
        """The distinct lemmas, without stop words."""
        return frozenset(self.content)

    @cached_property
    def bigrams(self) -> frozenset[tuple[str, ...]]:
        """The distinct bigrams of lemmas."""
        return frozenset(ngrams(self.lemmas, 2))

    @cached_property
    def trigrams(self) -> tuple[tuple[str, ...], ...]:
        """All trigrams of lemmas, in order."""
        return tuple(ngrams(self.lemmas, 3))

    @cached_property
    def numbers(self) -> frozenset[str]:
        """The distinct numbers written in digits."""
        return frozenset(NUMBER.findall(self.text))

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """Pieces that end with a full stop, a question or exclamation mark, or a line break."""
        return tuple(piece.strip() for piece in SENTENCE_END.split(self.text) if piece.strip())

    @cached_property
    def scripts(self) -> np.ndarray:
        """Shares of the letters in each of SCRIPTS and in other scripts: float64 [4], zeros without letters."""
        points = np.array([ord(character) for character in self.text if character.isalpha()], np.int64)
        counts = [int(((points >= low) & (points <= high)).sum()) for low, high in SCRIPTS]
        return np.array([*counts, len(points) - sum(counts)]) / max(len(points), 1)

    @cached_property
    def compression_ratio(self) -> float:
        """zlib-compressed bytes per byte: low for a text that repeats itself."""
        raw = self.text.encode()
        return len(zlib.compress(raw)) / max(len(raw), MIN_ZLIB_BYTES)
