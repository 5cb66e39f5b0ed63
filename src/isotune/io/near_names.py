"""The nearest name: what a misspelled key, file or choice was probably meant to be."""

import difflib
from collections.abc import Iterable


def nearest(written: object, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name of `names` that is spelled most like `written`, or None where none is near.

    Args:
        written: what the user wrote.
        names: the valid names.
        cutoff: the least similarity, from 0 (anything) to 1 (equal).
    """
    matches = difflib.get_close_matches(str(written), list(names), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(written: object, names: Iterable[str]) -> str:
    """The end of a sentence about a misspelled name: `: did you mean 'x'?`, or else the valid names."""
    names = list(names)
    near = nearest(written, names)
    return f": did you mean {near!r}?" if near else f"; it may have {', '.join(names)}"
