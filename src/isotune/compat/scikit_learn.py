"""scikit-learn 1.9: the check of an estimator's parameters without a fit."""

from typing import Any


def check_parameters(estimator: Any) -> None:
    """ValueError for a value that `fit` would refuse; private because no public check of scikit-learn needs no data."""
    estimator._validate_params()
