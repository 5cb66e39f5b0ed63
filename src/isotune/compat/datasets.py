"""datasets 5.2: the fingerprint of a data set's content has no public name."""

from typing import Any


def fingerprint_of(dataset: Any) -> str:
    """The digest that `datasets` keeps of a `Dataset`: of its source and of all that was done to it."""
    return str(dataset._fingerprint)
