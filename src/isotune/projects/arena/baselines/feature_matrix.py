"""The input matrices of the classical models, for both orders of each battle's answers.

TF-IDF, scales and SVD directions are fitted on the rows that `fit` is given, so cross-validation never fits on its test
rows. A row of a matrix depends on that row alone, to the bit, because sparse products run row by row; that makes the
swap-averaged prediction exactly equivariant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import StandardScaler

from isotune.projects.arena.baselines.features import Text, features
from isotune.projects.arena.battles import Battle

MAX_STANDARD_SCORE = 2.0  # linear models clip there: heavy tails would otherwise dominate
TFIDF_SCALE = 8.0  # a TF-IDF row has norm 1, a row of scaled features about 10
MIN_DOCUMENT_COUNT = 5  # of texts that contain a word
SVD_COMPONENTS = 24  # of TF-IDF, for the tree models

Lemmas = tuple[str, ...]


@dataclass(frozen=True)
class BattleFeatures:
    """The features of battles that need no fit, and the content lemmas of each row's texts."""

    given: np.ndarray  # float64 [rows, features]
    swapped: np.ndarray  # with exchanged answers
    prompts: tuple[Lemmas, ...]
    answers_a: tuple[Lemmas, ...]
    answers_b: tuple[Lemmas, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, rows: np.ndarray) -> "BattleFeatures":
        """The rows with these indices, int64 [rows], in their order."""
        texts = ([column[row] for row in rows] for column in (self.prompts, self.answers_a, self.answers_b))
        return BattleFeatures(self.given[rows], self.swapped[rows], *map(tuple, texts))


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of the same rows for linear and tree models: sparse and float64, both [rows, columns]."""

    linear: sparse.csr_matrix
    trees: np.ndarray


def battle_features(battles: Sequence[Battle]) -> BattleFeatures:
    """Compute everything that needs no fit; texts are their turns, joined by line breaks."""
    vectors, lemmas = [], []
    for battle in battles:
        prompt, a, b = (Text("\n".join(turns)) for turns in (battle.prompt, battle.answer_a, battle.answer_b))
        vectors.append(features(prompt, a, b, len(battle.prompt)))
        lemmas.append((prompt.content, a.content, b.content))
    given, swapped = (np.array(order) for order in zip(*vectors, strict=True))
    return BattleFeatures(given, swapped, *(tuple(column) for column in zip(*lemmas, strict=True)))


class FeatureMatrix:
    """The transformers that are fitted on training rows: TF-IDF, its SVD, and the scales of the features."""

    def __init__(self, seed: int) -> None:
        tokens: Any = tuple  # the texts are tokenized already
        self.tfidf = TfidfVectorizer(analyzer=tokens, min_df=MIN_DOCUMENT_COUNT, sublinear_tf=True)
        self.svd = TruncatedSVD(SVD_COMPONENTS, random_state=seed)
        self.scale = StandardScaler()

    def fit(self, rows: BattleFeatures) -> Self:
        """Fit on training rows in both orders."""
        self.tfidf.fit([*rows.prompts, *rows.answers_a, *rows.answers_b])
        answers = [self.tfidf.transform(texts) for texts in (rows.answers_a, rows.answers_b)]
        self.svd.fit(sparse.vstack([answers[0] - answers[1], answers[1] - answers[0]]).tocsr())
        self.scale.fit(np.concatenate([rows.given, rows.swapped]))
        return self

    def transform(self, rows: BattleFeatures) -> tuple[ModelInputs, ModelInputs]:
        """The inputs of the rows as given, and with exchanged answers."""
        prompts, a, b = (self.tfidf.transform(texts) for texts in (rows.prompts, rows.answers_a, rows.answers_b))
        together = [p + x + y for p, x, y in zip(rows.prompts, rows.answers_a, rows.answers_b, strict=True)]
        combined = self.tfidf.transform(map(sorted, together))  # sorted, so independent of the order of the answers
        of_pair, of_a, of_b = _row_products(a, b), _row_products(a, prompts), _row_products(b, prompts)
        return (
            self._inputs(rows.given, a - b, combined, np.column_stack([of_a - of_b, of_a + of_b, of_pair])),
            self._inputs(rows.swapped, b - a, combined, np.column_stack([of_b - of_a, of_b + of_a, of_pair])),
        )

    def _inputs(self, features: np.ndarray, difference: Any, combined: Any, similarity: np.ndarray) -> ModelInputs:
        """One order: TF-IDF of the answers' difference and of all texts together, similarities, features."""
        clipped = np.clip(self.scale.transform(features), -MAX_STANDARD_SCORE, MAX_STANDARD_SCORE)
        parts = [TFIDF_SCALE * difference, TFIDF_SCALE * combined, similarity, clipped]
        linear: Any = sparse.hstack(parts, format="csr")
        linear.sort_indices()
        return ModelInputs(linear, np.hstack([features, similarity, self.svd.transform(difference.tocsr())]))


def _row_products(one: sparse.csr_matrix, other: sparse.csr_matrix) -> np.ndarray:
    """The inner products of corresponding rows: float64 [rows]."""
    return np.asarray(one.multiply(other).sum(axis=1)).ravel()
