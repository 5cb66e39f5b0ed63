"""scikit-learn 1.9: the check of an estimator's parameters without a fit."""

from typing import Any


def check_parameters(estimator: Any) -> None:
    """What `fit` checks first; private because scikit-learn has no public check that needs no data.

    Raises:
        ValueError: a parameter has a value that the estimator does not accept.
    """
    estimator._validate_params()
