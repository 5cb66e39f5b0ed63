"""From battles to the matrices that classical models learn from, each row in both orders of its answers.

Whatever is learned here (words and their weights, scales, directions) is learned from the rows that `fit` is given, so
that cross-validation never looks at what it judges. A row's numbers depend on that row alone and on no other of its
matrix, to the bit: sparse products run row by row. That is what makes the swap-averaged prediction exactly equivariant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import StandardScaler

from isotune.projects.arena.baselines.features import features, texts_of
from isotune.projects.arena.battles import Battle

LARGEST_DEVIATIONS = 2.0  # of a feature in a linear model: beyond, a heavy tail would speak louder than the rest
TEXT_SCALE = 8.0  # a TF-IDF row has length 1, a row of scaled features about 10
SMALLEST_COUNT = 5  # of the texts that a word must stand in
DIRECTIONS = 24  # of TF-IDF that trees are given

Lemmas = tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """Battles as numbers and lemmas.

    Attributes:
        given, swapped: float64 [rows, features]; `features` in either order of the answers.
        prompts, answers_a, answers_b: the content lemmas of a text a row.
    """

    given: np.ndarray
    swapped: np.ndarray
    prompts: tuple[Lemmas, ...]
    answers_a: tuple[Lemmas, ...]
    answers_b: tuple[Lemmas, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, rows: np.ndarray) -> "Measured":
        """Some rows, int64 [rows], in that order."""
        texts = ([column[row] for row in rows] for column in (self.prompts, self.answers_a, self.answers_b))
        return Measured(self.given[rows], self.swapped[rows], *map(tuple, texts))


@dataclass(frozen=True)
class Views:
    """The same rows for two kinds of models: `linear` is sparse [rows, columns], `trees` float64 [rows, columns]."""

    linear: sparse.csr_matrix
    trees: np.ndarray


def measure(battles: Sequence[Battle]) -> Measured:
    """Count everything that does not have to be learned."""
    vectors, lemmas = [], []
    for battle in battles:
        prompt, a, b = texts_of(battle)
        vectors.append(features(prompt, a, b, len(battle.prompt)))
        lemmas.append((prompt.content, a.content, b.content))
    given, swapped = (np.array(order) for order in zip(*vectors, strict=True))
    return Measured(given, swapped, *(tuple(column) for column in zip(*lemmas, strict=True)))


class FeatureMatrix:
    """What the matrices take from training rows: the words of TF-IDF and their weights, scales, directions."""

    def __init__(self, seed: int) -> None:
        as_it_is: Any = _as_it_is
        self.words = TfidfVectorizer(analyzer=as_it_is, min_df=SMALLEST_COUNT, sublinear_tf=True)
        self.directions = TruncatedSVD(DIRECTIONS, random_state=seed)
        self.scale = StandardScaler()

    def fit(self, rows: Measured) -> Self:
        """Learn from training rows, both orders alike."""
        self.words.fit([*rows.prompts, *rows.answers_a, *rows.answers_b])
        answers = [self.words.transform(texts) for texts in (rows.answers_a, rows.answers_b)]
        self.directions.fit(sparse.vstack([answers[0] - answers[1], answers[1] - answers[0]]).tocsr())
        self.scale.fit(np.concatenate([rows.given, rows.swapped]))
        return self

    def transform(self, rows: Measured) -> tuple[Views, Views]:
        """The rows as given, and with their answers exchanged."""
        prompts, a, b = (self.words.transform(texts) for texts in (rows.prompts, rows.answers_a, rows.answers_b))
        together = [p + x + y for p, x, y in zip(rows.prompts, rows.answers_a, rows.answers_b, strict=True)]
        combined = self.words.transform(map(sorted, together))  # sorted: the order of the answers leaves no trace
        common = _products(a, b)
        return (
            self._views(rows.given, a - b, combined, np.stack([_products(a, prompts), _products(b, prompts)]), common),
            self._views(
                rows.swapped, b - a, combined, np.stack([_products(b, prompts), _products(a, prompts)]), common
            ),
        )

    def _views(
        self,
        numbers: np.ndarray,
        difference: sparse.csr_matrix,
        combined: sparse.csr_matrix,
        to_prompt: np.ndarray,
        common: np.ndarray,
    ) -> Views:
        """One order: TF-IDF of separate and of combined texts, likeness to the prompt and of each other, features."""
        likeness = np.column_stack([to_prompt[0] - to_prompt[1], to_prompt[0] + to_prompt[1], common])
        clipped = np.clip(self.scale.transform(numbers), -LARGEST_DEVIATIONS, LARGEST_DEVIATIONS)
        linear: Any = sparse.hstack([TEXT_SCALE * difference, TEXT_SCALE * combined, likeness, clipped], format="csr")
        linear.sort_indices()
        return Views(linear, np.hstack([numbers, likeness, self.directions.transform(difference.tocsr())]))


def _products(one: sparse.csr_matrix, other: sparse.csr_matrix) -> np.ndarray:
    """The inner product of each pair of rows: float64 [rows]."""
    return np.asarray(one.multiply(other).sum(axis=1)).ravel()


def _as_it_is(lemmas: Lemmas) -> Lemmas:
    return lemmas
