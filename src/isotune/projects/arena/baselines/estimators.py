"""The classical models, each with what is tried for it, behind one form: learn from both orders, average both orders.

    trained on   (a, b) -> label         predicts   p(a, b) = [ f(a, b) + exchanged f(b, a) ] / 2
                 (b, a) -> exchanged

A sum of two numbers does not depend on their order, so p(b, a) is p(a, b) with its first two numbers exchanged, bit for
bit, whatever f is.
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

from isotune.io.errors import UserError
from isotune.projects.arena.baselines.feature_matrix import Views
from isotune.projects.arena.battles import SWAPPED_CLASSES

CALIBRATION_FOLDS = 3
SMALLEST_PROBABILITY = 1e-4  # a forest may say 0, for which one mistake would cost everything


@dataclass(frozen=True)
class Estimator:
    """A kind of model: which view it reads, its class, the values that are fixed, and those that are tried."""

    view: str
    kind: Callable[..., Any]
    fixed: dict[str, Any]
    grid: dict[str, list[Any]]

    def make(self, seed: int, **tried: Any) -> Any:
        """The model before it has learned anything."""
        return self.kind(**{**self.fixed, "random_state": seed, **tried})


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
    """The grids that a recipe gives, or those of MEMBERS where it gives none.

    Raises:
        UserError: an unknown model or parameter, or a value that the model does not take.
    """
    if grids is None:
        return {name: member.grid for name, member in MEMBERS.items()}
    for name, grid in grids.items():
        if name not in MEMBERS:
            raise UserError(f"grids: there is no model {name!r}; there are {', '.join(MEMBERS)}")
        known = MEMBERS[name].make(0).get_params()
        for parameter, tried in (grid or {}).items():
            if parameter not in known:
                raise UserError(f"grids: {name} has no parameter {parameter!r}")
            if not isinstance(tried, list) or not tried:
                raise UserError(f"grids: {name}, {parameter}: write what is tried as a list, [VALUE, ...]")
            for value in tried:
                try:  # scikit-learn's own check, which its fit begins with
                    MEMBERS[name].make(0).set_params(**{parameter: value})._validate_params()
                except ValueError as error:
                    raise UserError(f"grids: {name}: {' '.join(str(error).split())}") from None
    return {name: grid or {} for name, grid in grids.items()}


class SwapAveraged:
    """One member, trained on both orders of every row, and predicting by the mean of both."""

    def __init__(self, name: str, parameters: dict[str, Any], seed: int) -> None:
        self.name, self.view = name, MEMBERS[name].view
        self.parameters, self.seed = parameters, seed
        self.model: Any = MEMBERS[name].make(seed, **parameters)

    def fit(self, given: Views, swapped: Views, labels: np.ndarray, groups: np.ndarray) -> "SwapAveraged":
        """Learn. Rows of a group, [rows], never stand on both sides of a calibration."""
        both = [getattr(views, self.view) for views in (given, swapped)]
        matrix: Any = sparse.vstack(both, format="csr") if self.view == "linear" else np.concatenate(both)
        all_labels = np.concatenate([labels, np.array(SWAPPED_CLASSES)[labels]])
        if self.name in CALIBRATED:
            folds = GroupKFold(CALIBRATION_FOLDS).split(matrix, groups=np.concatenate([groups, groups]))
            self.model = CalibratedClassifierCV(self.model, cv=list(folds))
        self.model.fit(matrix, all_labels)
        return self

    def predict(self, given: Views, swapped: Views) -> np.ndarray:
        """Probabilities of a, b and tie: float64 [rows, 3], each row summing to 1."""
        one, other = (self._shares(getattr(views, self.view)) for views in (given, swapped))
        return normalised(np.maximum((one + other[:, SWAPPED_CLASSES]) / 2, SMALLEST_PROBABILITY))

    def _shares(self, matrix: Any) -> np.ndarray:
        """What the model says of every class; of one that stood in none of its rows it says nothing: [rows, 3]."""
        shares = np.zeros((matrix.shape[0], len(SWAPPED_CLASSES)))
        shares[:, self.model.classes_] = self.model.predict_proba(matrix)
        return shares


def normalised(shares: np.ndarray) -> np.ndarray:
    """Rows that sum to 1, [rows, 3]; a and b are added first, so that their order makes no difference in any bit."""
    return shares / ((shares[:, 0] + shares[:, 1]) + shares[:, 2])[:, None]
