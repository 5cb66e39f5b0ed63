"""The classical models with their parameter grids, each trained on both orders of the answers and averaged over both.

    trained on   (a, b) -> label            predicts   p(a, b) = [ f(a, b) + swapped f(b, a) ] / 2
                 (b, a) -> swapped label

A sum of two numbers does not depend on their order, so p(b, a) is p(a, b) with its first two numbers exchanged, bit for
bit, for any f.

TF-IDF, scales and SVD directions are fitted on the rows that `fit` is given, so cross-validation never fits on its test
rows. A row of a matrix depends on that row alone, to the bit, because sparse products run row by row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from isotune.compat.scikit_learn import check_parameters
from isotune.evaluation.statistics.blending import normalize
from isotune.io.errors import UserError
from isotune.projects.arena.baselines.features import Text, features
from isotune.projects.arena.battles import SWAPPED_CLASSES, Battle

MAX_STANDARD_SCORE = 2.0  # linear models clip there: heavy tails would otherwise dominate
TFIDF_SCALE = 8.0  # a TF-IDF row has norm 1, a row of scaled features about 10
MIN_DOCUMENT_COUNT = 5  # of texts that contain a word
SVD_COMPONENTS = 24  # of TF-IDF, for the tree models
CALIBRATION_FOLDS = 3
MIN_PROBABILITY = 1e-4  # a forest may predict 0, whose log loss is infinite

Lemmas = tuple[str, ...]
ModelInputs = dict[str, Any]  # of the same rows: `linear`, sparse, and `trees`, dense; both float64 [rows, columns]


@dataclass(frozen=True)
class BattleFeatures:
    """The features of battles that need no fit, and the content lemmas of each row's texts."""

    given: np.ndarray  # float64 [rows, features]
    swapped: np.ndarray  # with exchanged answers
    prompts: tuple[Lemmas, ...]
    answers_a: tuple[Lemmas, ...]
    answers_b: tuple[Lemmas, ...]

    def subset(self, rows: np.ndarray) -> "BattleFeatures":
        """The rows with these indices, int64 [rows], in their order."""
        texts = ([column[row] for row in rows] for column in (self.prompts, self.answers_a, self.answers_b))
        return BattleFeatures(self.given[rows], self.swapped[rows], *map(tuple, texts))


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

    @property
    def parts(self) -> dict[str, Any]:
        """The transformers by name."""
        return {"tfidf": self.tfidf, "svd": self.svd, "scale": self.scale}

    @classmethod
    def of_parts(cls, parts: dict[str, Any]) -> Self:
        """The matrix of fitted transformers."""
        made = cls(seed=0)
        made.tfidf, made.svd, made.scale = parts["tfidf"], parts["svd"], parts["scale"]
        return made

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
        return {"linear": linear, "trees": np.hstack([features, similarity, self.svd.transform(difference.tocsr())])}


def _row_products(one: sparse.csr_matrix, other: sparse.csr_matrix) -> np.ndarray:
    """The inner products of corresponding rows: float64 [rows]."""
    return np.asarray(one.multiply(other).sum(axis=1)).ravel()


@dataclass(frozen=True)
class Estimator:
    """A scikit-learn class: the kind of ModelInputs that it reads, its fixed parameters and its default grid."""

    inputs: str
    estimator_class: Callable[..., Any]
    fixed: dict[str, Any]
    grid: dict[str, list[Any]]

    def create(self, seed: int, **parameters: Any) -> Any:
        """An estimator that is not fitted."""
        return self.estimator_class(**{**self.fixed, "random_state": seed, **parameters})


MEMBERS = {
    "logistic_regression": Estimator(
        "linear", LogisticRegression, {"max_iter": 300, "tol": 1e-3}, {"C": [0.0015, 0.003, 0.006]}
    ),
    "linear_svm": Estimator(
        "linear", LinearSVC, {"dual": True, "tol": 1e-3, "max_iter": 3_000}, {"C": [0.0001, 0.0004]}
    ),
    "random_forest": Estimator(
        "trees",
        RandomForestClassifier,
        {"n_estimators": 200, "max_features": 0.2, "n_jobs": 1},
        {"min_samples_leaf": [3, 8]},
    ),
    "gradient_boosting": Estimator(
        "trees",
        HistGradientBoostingClassifier,
        {"learning_rate": 0.04, "l2_regularization": 5.0, "min_samples_leaf": 40, "max_features": 0.3,
         "early_stopping": False},
        {"max_leaf_nodes": [6, 10], "max_iter": [200]},
    ),
}  # fmt: skip
CALIBRATED = ("linear_svm",)

Grids = dict[str, dict[str, list[Any]]]


def check_grids(grids: Any) -> Grids:
    """The recipe's grids, or the default ones; UserError for an unknown model or parameter, or a value it refuses."""
    if grids is None:
        return {name: estimator.grid for name, estimator in MEMBERS.items()}
    for name, grid in grids.items():
        if name not in MEMBERS:
            raise UserError(f"grids: there is no model {name!r}; there are {', '.join(MEMBERS)}")
        known = MEMBERS[name].create(0).get_params()
        for parameter, values in (grid or {}).items():
            if parameter not in known:
                raise UserError(f"grids: {name} has no parameter {parameter!r}")
            if not isinstance(values, list) or not values:
                raise UserError(f"grids: {name}, {parameter}: write the values as a list, [VALUE, ...]")
            for value in values:
                try:
                    check_parameters(MEMBERS[name].create(0, **{parameter: value}))
                except ValueError as error:
                    raise UserError(f"grids: {name}: {' '.join(str(error).split())}") from None
    return {name: grid or {} for name, grid in grids.items()}


class SwapAveraged:
    """An estimator that is trained on both orders of every row and predicts the mean of both orders."""

    def __init__(self, name: str, parameters: dict[str, Any], seed: int) -> None:
        self.inputs = MEMBERS[name].inputs
        self.model: Any = MEMBERS[name].create(seed, **parameters)
        self.is_calibrated = name in CALIBRATED

    @classmethod
    def of_fitted(cls, name: str, model: Any) -> "SwapAveraged":
        """That of a fitted estimator, with its calibration where it has one."""
        made = cls(name, {}, seed=0)
        made.model = model
        return made

    def fit(self, given: ModelInputs, swapped: ModelInputs, labels: np.ndarray, groups: np.ndarray) -> "SwapAveraged":
        """Fit on both orders; rows of one of `groups`, [rows], are never on both sides of a calibration split."""
        both = [inputs[self.inputs] for inputs in (given, swapped)]
        matrix: Any = sparse.vstack(both, format="csr") if self.inputs == "linear" else np.concatenate(both)
        all_labels = np.concatenate([labels, np.array(SWAPPED_CLASSES)[labels]])
        if self.is_calibrated:
            folds = GroupKFold(CALIBRATION_FOLDS).split(matrix, groups=np.concatenate([groups, groups]))
            self.model = CalibratedClassifierCV(self.model, cv=list(folds))
        self.model.fit(matrix, all_labels)
        return self

    def predict(self, given: ModelInputs, swapped: ModelInputs) -> np.ndarray:
        """Probabilities of a, b and tie: float64 [rows, 3], each row summing to 1."""
        one, other = (self._probabilities(inputs[self.inputs]) for inputs in (given, swapped))
        return normalize(np.maximum((one + other[:, SWAPPED_CLASSES]) / 2, MIN_PROBABILITY))

    def _probabilities(self, matrix: Any) -> np.ndarray:
        """The model's probability of each class, 0 for a class without training rows: [rows, 3]."""
        probabilities = np.zeros((matrix.shape[0], len(SWAPPED_CLASSES)))
        probabilities[:, self.model.classes_] = self.model.predict_proba(matrix)
        return probabilities
