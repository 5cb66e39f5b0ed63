"""The classical models with their parameter grids, each trained on both orders of the answers and averaged over both.

    trained on   (a, b) -> label            predicts   p(a, b) = [ f(a, b) + swapped f(b, a) ] / 2
                 (b, a) -> swapped label

A sum of two numbers does not depend on their order, so p(b, a) is p(a, b) with its first two numbers exchanged, bit for
bit, for any f.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.svm import LinearSVC

from isotune.compat.scikit_learn import check_parameters
from isotune.io.errors import UserError
from isotune.projects.arena.baselines.feature_matrix import ModelInputs
from isotune.projects.arena.battles import SWAPPED_CLASSES, normalize

CALIBRATION_FOLDS = 3
MIN_PROBABILITY = 1e-4  # a forest may predict 0, whose log loss is infinite


@dataclass(frozen=True)
class Estimator:
    """A scikit-learn class: the field of ModelInputs that it reads, its fixed parameters and its default grid."""

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
    """The recipe's grids, or the default grids if it has none.

    Raises UserError for an unknown model or parameter, or a value that the model does not accept.
    """
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

    def fit(self, given: ModelInputs, swapped: ModelInputs, labels: np.ndarray, groups: np.ndarray) -> "SwapAveraged":
        """Fit on both orders; rows of one of `groups`, [rows], are never on both sides of a calibration split."""
        both = [getattr(inputs, self.inputs) for inputs in (given, swapped)]
        matrix: Any = sparse.vstack(both, format="csr") if self.inputs == "linear" else np.concatenate(both)
        all_labels = np.concatenate([labels, np.array(SWAPPED_CLASSES)[labels]])
        if self.is_calibrated:
            folds = GroupKFold(CALIBRATION_FOLDS).split(matrix, groups=np.concatenate([groups, groups]))
            self.model = CalibratedClassifierCV(self.model, cv=list(folds))
        self.model.fit(matrix, all_labels)
        return self

    def predict(self, given: ModelInputs, swapped: ModelInputs) -> np.ndarray:
        """Probabilities of a, b and tie: float64 [rows, 3], each row summing to 1."""
        one, other = (self._probabilities(getattr(inputs, self.inputs)) for inputs in (given, swapped))
        return normalize(np.maximum((one + other[:, SWAPPED_CLASSES]) / 2, MIN_PROBABILITY))

    def _probabilities(self, matrix: Any) -> np.ndarray:
        """The model's probability of each class, 0 for a class without training rows: [rows, 3]."""
        probabilities = np.zeros((matrix.shape[0], len(SWAPPED_CLASSES)))
        probabilities[:, self.model.classes_] = self.model.predict_proba(matrix)
        return probabilities
