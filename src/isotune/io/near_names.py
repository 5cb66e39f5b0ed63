"""The name that somebody probably meant."""

import difflib
from collections.abc import Iterable


def nearest(written: object, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name of `names` that is spelled most like `written`, or None where none is near.

    Args:
        written: what the user wrote.
        names: what would have been right.
        cutoff: how alike they must be, from 0 (anything) to 1 (equal).
    """
    near = difflib.get_close_matches(str(written), list(names), n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(written: object, names: Iterable[str]) -> str:
    """`: did you mean 'x'?` for a misspelled name, or what there is to choose from; the end of a sentence."""
    names = list(names)
    near = nearest(written, names)
    return f": did you mean {near!r}?" if near else f"; it may have {', '.join(names)}"
