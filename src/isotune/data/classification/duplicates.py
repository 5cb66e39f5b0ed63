"""Which documents stand in both of two sets of texts, exactly or nearly: what was learned must not be examined.

Two texts are *exactly* the same where their normalised texts are (isotune.data.clean_text: HTML and escapes undone, no
case, Unicode's NFKC, single blanks). They are *nearly* the same where the sets of their runs of three words, written in
letters and digits, have a Jaccard similarity of at least 0.8: one word changed in thirty, a sentence put before ten.
Candidates are found by MinHash in 24 bands of 5 (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3) and each is
then computed exactly, so nothing is called near that is not; a pair right at 0.8 is overlooked once in 14,000. An empty
text stands nowhere.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tqdm import tqdm

from isotune.data.cache import load_or_build
from isotune.data.classification.preparation import LabelledSet
from isotune.data.clean_text import EMPTY, normalised
from isotune.data.sft.preparation import digest

DUPLICATES_FORMAT_VERSION = 1  # raised when the same texts are compared otherwise

NEAR_JACCARD = 0.8
RUN_WORDS = 3
BANDS, BAND_ROWS = 24, 5
SEED = 42
TEXTS_AT_ONCE = 1_000

EXACTLY, NEARLY = 1, 2
HOW = {"exactly": EXACTLY, "nearly": NEARLY}

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """How each document stands in the other set: 0 not at all, EXACTLY or NEARLY; uint8 [documents] of either set."""

    train: np.ndarray
    evaluation: np.ndarray

    @staticmethod
    def counted(documents: np.ndarray) -> dict[str, int]:
        """The documents of one set by how they stand in the other."""
        return {name: int((documents == how).sum()) for name, how in HOW.items()}


def compare(train: LabelledSet, evaluation: LabelledSet, *, show_progress: bool) -> Overlap:
    """Find the documents that stand in both sets; kept on disk under the fingerprints of both."""
    fingerprint = digest("overlap", DUPLICATES_FORMAT_VERSION, train.fingerprint, evaluation.fingerprint)

    def build() -> tuple[Overlap, dict[str, int]]:
        return find_overlap(train, evaluation, show_progress=show_progress), {}

    return load_or_build(fingerprint, build, Overlap)[0]


def find_overlap(train: LabelledSet, evaluation: LabelledSet, *, show_progress: bool) -> Overlap:
    """The same, computed. The texts of `evaluation` are held in memory, those of `train` pass by."""
    found = Overlap(
        train=_exactly_in(train.texts.contents, evaluation.texts.contents),
        evaluation=_exactly_in(evaluation.texts.contents, train.texts.contents),
    )
    index = _NearIndex(list(evaluation.read_texts()))
    texts = enumerate(train.read_texts())
    with tqdm(desc="comparing", total=len(train.texts), unit=" documents", disable=not show_progress) as bar:
        while some := list(islice(texts, TEXTS_AT_ONCE)):
            for (number, _), near in zip(some, index.near([text for _, text in some]), strict=True):
                if near and not found.train[number]:
                    found.train[number] = NEARLY
                for other in near:
                    found.evaluation[other] = found.evaluation[other] or NEARLY
            bar.update(len(some))
    return found


def runs_of_words(text: str) -> frozenset[str]:
    """The runs of RUN_WORDS words in a text; a shorter text is one run, and one without words has none."""
    words = _WORD.findall(normalised(text))
    if len(words) < RUN_WORDS:
        return frozenset([" ".join(words)] if words else [])
    return frozenset(map(" ".join, zip(*(words[n:] for n in range(RUN_WORDS)), strict=False)))


class _NearIndex:
    """Texts that can be asked which of them are nearly another text."""

    def __init__(self, texts: list[str]) -> None:
        from rensa import RMinHashLSH  # type: ignore[attr-defined]  (0.5.0 has no type stubs)

        self._texts = texts
        self._index = RMinHashLSH(threshold=NEAR_JACCARD, num_perm=BANDS * BAND_ROWS, num_bands=BANDS)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            runs = [runs_of_words(text) for text in texts[start : start + TEXTS_AT_ONCE]]
            for number, (own, sketch) in enumerate(zip(runs, _sketches(runs), strict=True), start):
                if own:
                    self._index.insert(number, sketch)

    def near(self, texts: list[str]) -> Iterator[list[int]]:
        """For each text the numbers of those that are nearly, or exactly, it."""
        runs = [runs_of_words(text) for text in texts]
        for own, sketch in zip(runs, _sketches(runs), strict=True):
            candidates = self._index.query(sketch) if own else []
            yield [number for number in candidates if jaccard(own, runs_of_words(self._texts[number])) >= NEAR_JACCARD]


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """What two sets share, of what either has."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def _sketches(runs: list[frozenset[str]]) -> list:
    from rensa import RMinHash  # type: ignore[attr-defined]

    return RMinHash.from_token_sets([list(own) for own in runs], num_perm=BANDS * BAND_ROWS, seed=SEED)


def _exactly_in(contents: np.ndarray, others: np.ndarray) -> np.ndarray:
    found = np.isin(contents, others) & (contents != np.uint64(EMPTY))
    return np.where(found, EXACTLY, 0).astype(np.uint8)
