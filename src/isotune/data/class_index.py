"""Which class of a list of names a cell means, however it is written.

A cell may hold a whole number (`1`, `1.0`, `"1"`), a word, or true and false. Names are compared without regard to case
and to spaces, for which underscores may stand, numbers only where the names are none.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from isotune.data.sources.class_labels import fold
from isotune.data.sources.source import is_null

Label = int | bool | str  # a cell as it is meant, before it is known which class that is

SHOWN_NAMES = 12
_TRUTH = {
    **dict.fromkeys(("true", "yes", "y", "positive", "pos"), True),
    **dict.fromkeys(("false", "no", "n", "negative", "neg"), False),
}
TRUTHS = ("true", "false")  # as texts
WHOLE = re.compile(r"[+-]?\d{1,18}(?:\.0*)?", re.A)


def listed(names: Iterable[object]) -> str:
    """Names as a sentence lists them."""
    every = [str(name) for name in names]
    shown = ", ".join(every[:SHOWN_NAMES])
    return shown if len(every) <= SHOWN_NAMES else f"{shown} and {len(every) - SHOWN_NAMES:,} more"


class NameIndex:
    """Finds names in a list of class names: folded, or as they are written where two differ in that alone."""

    def __init__(self, names: Sequence[object]) -> None:
        self.names = tuple(str(name) for name in names)
        keys: tuple[Callable[[object], str], ...] = (_without_underscores, fold)
        self._key = next((key for key in keys if len(set(map(key, self.names))) == len(self.names)), str)
        self._number = {self._key(name): number for number, name in enumerate(self.names)}
        self.are_numbers = all(WHOLE.fullmatch(name.strip()) for name in self.names)
        found = [re.findall(r"\d+", name) for name in self.names]
        # by the one number in each name, its place: `1 star`, `2 stars`; none where names have none, or the same
        self.numbers = {int(each[0]): place for place, each in enumerate(found) if len(each) == 1}
        if self.are_numbers or len(self.numbers) < len(self.names):
            self.numbers = {}

    def find(self, name: object) -> int | None:
        """The number of a name in the list; None where it is not there."""
        return self._number.get(self._key(name))

    def of_truth(self, truth: bool) -> tuple[int | None, bool]:
        """The class that means true or false, and whether its name says so: else it is the place among two classes."""
        if self.are_numbers:
            return self.find(int(truth)), True
        meant = [_TRUTH.get(fold(name)) for name in self.names]
        if sorted(map(str, meant)) == ["False", "True"]:
            return meant.index(truth), True
        return int(truth) if len(self.names) == 2 else None, False

    def order_of(self, others: Sequence[object]) -> list[int] | None:
        """Where each of the other names stands here; None where the two lists are not the same names."""
        found = [self.find(name) for name in others]
        places = [place for place in found if place is not None]
        return places if len(others) == len(self.names) and sorted(places) == list(range(len(self.names))) else None


def _without_underscores(name: object) -> str:
    return fold(str(name).replace("_", " "))


def label_of(cell: Any, names: Sequence[str] = ()) -> Label:
    """The label in a cell; ValueError says what it holds where that is none.

    `names` are those of a ClassLabel column, whose cells hold the numbers of its names.
    """
    if isinstance(cell, Decimal):
        cell = float(cell)
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, str):
        if word := cell.strip():
            return word
        raise ValueError("an empty text")
    if not isinstance(cell, int) or abs(cell) >= 2**31:
        raise ValueError("null" if is_null(cell) else repr(cell)[:40])
    if not names:
        return cell
    if not 0 <= cell < len(names):
        raise ValueError(f"{cell}, and its column has the classes 0 to {len(names) - 1}: {listed(names)}")
    return names[cell]


def place_of(label: Label, known: NameIndex) -> int | None:
    """The class of a label: by its name, else by its number where the names are no numbers; None where it has none."""
    return find_class(label, known)[0]


def find_class(label: Label, known: NameIndex) -> tuple[int | None, bool]:
    """The same, and whether a name says so: else the label is the place of a class in the order of the names."""
    name = str(label).lower() if isinstance(label, bool) else label
    if (place := known.find(name)) is not None:
        return place, True
    if isinstance(name, str) and name.lower() in TRUTHS:
        return known.of_truth(name.lower() == "true")
    if isinstance(label, str):
        return find_class(int(float(label)), known) if WHOLE.fullmatch(label) else (None, False)
    if known.are_numbers or not 0 <= label < len(known.names):
        return None, False
    return label, label in (0, 1) and fold(known.names[label]) == str(bool(label)).lower()
