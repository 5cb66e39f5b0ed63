"""The classes of a data set: which class a cell holds, however it is written, and how two lists of names are aligned.

A cell may hold a whole number (`1`, `1.0`, `"1"`), a word, or true and false. A code with a zero in front, as in `01`,
is a word. Names are compared without regard to case and to spaces, for which underscores may stand, numbers only where
one side has no names.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from isotune.data.sources.class_labels import fold
from isotune.data.sources.source import is_null
from isotune.io.errors import UserError

Label = int | bool | str  # a cell as it is meant, before it is known which class that is

SHOWN_NAMES = 12
MOST_CLASSES = 1_000  # of words: more are texts that somebody took for classes

MISSING = frozenset(("na", "n/a", "nan", "null", "none", "nil", "-", "?", "#n/a", "<na>"))

_TRUTH = {
    **dict.fromkeys(("true", "yes", "y", "positive", "pos"), True),
    **dict.fromkeys(("false", "no", "n", "negative", "neg"), False),
}
_WHOLE = re.compile(r"[+-]?\d{1,18}(?:\.0*)?", re.A)
_PADDED = re.compile(r"0\d+", re.A)  # a code such as 007


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
        self.are_numbers = all(_WHOLE.fullmatch(name.strip()) for name in self.names)
        found = [re.findall(r"\d+", name) for name in self.names]
        # by the one number in each name, its place: `1 star`, `2 stars`; none where names have none, or the same
        self.numbers = {int(each[0]): place for place, each in enumerate(found) if len(each) == 1}
        if self.are_numbers or len(self.numbers) < len(self.names):
            self.numbers = {}

    def find(self, name: object) -> int | None:
        """The number of a name in the list; None where it is not there."""
        return self._number.get(self._key(name))

    def of_truth(self, truth: bool) -> int | None:
        """The class that means true or false: of two by their words where these say it (yes, no), else by place."""
        if self.are_numbers:
            return self.find(int(truth))
        meant = [_TRUTH.get(fold(name)) for name in self.names]
        if sorted(map(str, meant)) == ["False", "True"]:
            return meant.index(truth)
        return int(truth) if len(self.names) == 2 else None

    def order_of(self, others: Sequence[object]) -> list[int] | None:
        """Where each of the other names stands here; None where the two lists are not the same names."""
        found = [self.find(name) for name in others]
        places = [place for place in found if place is not None]
        return places if len(others) == len(self.names) and sorted(places) == list(range(len(self.names))) else None


def _without_underscores(name: object) -> str:
    return fold(str(name).replace("_", " "))


@dataclass(frozen=True)
class ClassColumn:
    """The classes of a column of labels."""

    labels: np.ndarray  # int32 [rows]
    names: tuple[str, ...] | None  # by class; None where the data and the recipe have none
    # whether the numbers are the data's own: those of words, in the order of the alphabet, are not
    numbered: bool = True
    spellings: int = 0  # words that were counted with another one, because they differ in case or spaces


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


def resolve(
    labels: Sequence[Label],
    *,
    where: Callable[[int], str],
    known: Sequence[str] | None = None,
    own: Sequence[Sequence[str]] = (),
    count: int | None = None,
) -> ClassColumn:
    """The classes of a column's labels.

    `known` are the names of the classes in their order, which the recipe, the training data or the model say. `own` are
    the names that the data itself lists, such as a ClassLabel's, and further lists of names of the same classes; the
    first list whose names are known counts. Without both, words become classes in the order of the alphabet. `count` is
    the number of classes, where it is known, and 0 where numbers are never names. `where`
    names a row, counted from 0. UserError where a label is no class of these.
    """
    if not own:
        labels = _as_numbers(labels)
    if known is not None:
        return ClassColumn(_aligned(labels, NameIndex(known), own, where), tuple(known))
    kinds = [bool if isinstance(label, bool) else type(label) for label in labels]
    _check_missing(labels, where)
    if own:
        return ClassColumn(_aligned(labels, NameIndex(own[0]), own[:1], where), tuple(own[0]))
    rarest = min(dict.fromkeys(kinds), key=kinds.count)
    row = kinds.index(rarest)
    other = next((other for other, kind in enumerate(kinds) if kind is not rarest), None)
    if other is not None:
        raise UserError(
            f"{where(row)} holds {labels[row]!r} and {where(other)} {labels[other]!r}: a class is a whole number, "
            "a word, or true or false, and these are not mixed (label_names says which classes there are)"
        )
    if kinds[0] is bool:
        return ClassColumn(np.array(labels, np.int32), ("false", "true"))
    if kinds[0] is str:
        return _of_words([str(label) for label in labels], where)
    counted = _counted_from_elsewhere(labels)
    if counted is not None and count in (None, len(counted.names or ())):
        return counted
    negative = next((row for row, label in enumerate(labels) if label < 0), None)  # type: ignore[operator]  (numbers)
    if negative is not None:
        raise UserError(
            f"{where(negative)} holds {labels[negative]}: a class is a whole number from 0, a word, or true or false; "
            "label_names says what the classes are called where they are other numbers"
        )
    return ClassColumn(np.array(labels, np.int32), None)


def _as_numbers(labels: Sequence[Label]) -> Sequence[Label]:
    """Texts that are whole numbers of a column of classes, as numbers, also beside numbers.

    Codes such as 01 and 10 keep their zeros, unless they are only another spelling of numbers that stand there too.
    """
    if not all(type(label) is int or (isinstance(label, str) and _WHOLE.fullmatch(label)) for label in labels):
        return labels
    number_of = {label: int(str(label).partition(".")[0]) for label in set(labels)}
    if max(map(abs, number_of.values())) >= 2**31:
        return labels
    are_codes = any(isinstance(label, str) and _PADDED.fullmatch(label) for label in number_of)
    if are_codes and len(set(number_of.values())) == len(number_of):
        return labels
    return [number_of[label] for label in labels]


def _check_missing(labels: Sequence[Label], where: Callable[[int], str]) -> None:
    """Raise UserError for what programs write for a missing number, in a column whose other texts are numbers."""
    distinct = {label for label in labels if isinstance(label, str)}
    missing = {label for label in distinct if label.casefold() in MISSING}
    if missing and len(missing) < len(distinct) and all(map(_WHOLE.fullmatch, distinct - missing)):
        row = next(row for row, label in enumerate(labels) if label in missing)
        raise UserError(
            f"{where(row)} holds {labels[row]!r}, and other rows numbers: a row without a class is left out by whoever "
            "writes the file (label_names says which classes there are, if it is one)"
        )


def _counted_from_elsewhere(numbers: Sequence[Any]) -> ClassColumn | None:
    """Classes that are numbered from 1 or later without a gap, as stars are, or -1 and 1: their numbers are names.

    Others stay as they are: -1 beside 0 and 1 may be a class or stand for none, and a gap may be a class without rows.
    """
    distinct = sorted(set(numbers))
    follow = distinct[0] >= 1 and distinct[-1] - distinct[0] == len(distinct) - 1
    if not 2 <= len(distinct) <= MOST_CLASSES or not (follow or distinct == [-1, 1]):
        return None
    place = {number: at for at, number in enumerate(distinct)}
    return ClassColumn(np.array([place[number] for number in numbers], np.int32), tuple(map(str, distinct)), False)


def _of_words(words: list[str], where: Callable[[int], str]) -> ClassColumn:
    spellings: dict[str, set[str]] = {}
    for word in words:
        spellings.setdefault(fold(word), set()).add(" ".join(word.split()))
    if len(spellings) > MOST_CLASSES or (len(words) > 2 and len(spellings) > len(words) / 2 and len(spellings) > 4):
        raise UserError(
            f"{where(0)} and {len(words) - 1:,} more hold {len(spellings):,} classes, {words[0][:40]!r} first: these "
            "are texts and no classes; dataset_label_field names the column of the classes, and label_names the "
            "classes where there really are so many"
        )
    number = {word: place for place, word in enumerate(sorted(spellings))}
    names = tuple(min(spellings[word]) for word in sorted(spellings))
    merged = sum(len(each) - 1 for each in spellings.values())
    return ClassColumn(np.array([number[fold(word)] for word in words], np.int32), names, False, merged)


def _aligned(
    labels: Sequence[Label], known: NameIndex, own: Sequence[Sequence[str]], where: Callable[[int], str]
) -> np.ndarray:
    """The class of each label among known names: int32 [rows]."""
    distinct = {_key(label): label for label in labels}
    if own:
        listed_at = NameIndex(own[0])
        places = {key: place_of(label, listed_at) for key, label in distinct.items()}
        tables = [
            {key: None if place is None else known.find(names[place]) for key, place in places.items()} for names in own
        ]
    else:
        tables = [{key: place_of(label, known) for key, label in distinct.items()}]
    table = next((each for each in tables if None not in each.values()), tables[0])
    if not own and known.numbers:
        table = _by_numbers_in_names(labels, distinct, table, known, where)
    classes = [table[_key(label)] for label in labels]
    if None in classes:
        row = classes.index(None)
        of_data = own[0] if own else sorted(map(str, distinct.values()))
        raise UserError(
            f"{where(row)} is of class {str(labels[row])[:60]!r}: the data has the classes {listed(of_data)}, and they "
            f"are to be {listed(known.names)}"
        )
    return np.array(classes, np.int32)


def _by_numbers_in_names(
    labels: Sequence[Label], distinct: dict[Any, Label], table: dict[Any, int | None], known: NameIndex, where: Any
) -> dict[Any, int | None]:
    """The table of places where numbers are those that the names have, such as 5 of `5 stars`.

    UserError where they may be these, or the places of the classes counted from 0, and that is not the same.
    """
    if not all(type(label) is int or (isinstance(label, str) and _WHOLE.fullmatch(label)) for label in labels):
        return table
    meant = {key: known.numbers.get(int(float(label))) for key, label in distinct.items()}
    if None in meant.values() or meant == table:
        return table
    if None not in table.values():
        row = next(row for row, label in enumerate(labels) if meant[_key(label)] != table[_key(label)])
        one, other = (known.names[each[_key(labels[row])] or 0] for each in (meant, table))
        raise UserError(
            f"{where(row)} is of class {labels[row]}, which may be {one!r} or, counted from 0, {other!r}: write the "
            "names of the classes in the data"
        )
    return meant


def _key(label: Label) -> Any:
    return (type(label), label)  # True == 1 in Python


def place_of(label: Label, known: NameIndex) -> int | None:
    """The class of a label: by its name, else by its number where the names are no numbers; None where it has none."""
    name = str(label).lower() if isinstance(label, bool) else label
    if (place := known.find(name)) is not None:
        return place
    if isinstance(name, str) and name.lower() in ("true", "false"):
        return known.of_truth(name.lower() == "true")
    if isinstance(label, str):
        return place_of(int(float(label)), known) if _WHOLE.fullmatch(label) else None
    return int(label) if not known.are_numbers and 0 <= label < len(known.names) else None
