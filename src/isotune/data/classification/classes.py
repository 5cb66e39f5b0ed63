"""The classes of a data set: which class a cell holds, however it is written, and how two lists of names are aligned.

A cell may hold a whole number (`1`, `1.0`, `"1"`), a word, or true and false. A code with a zero in front, as in `01`,
is a word. Names are compared without regard to case and to spaces, for which underscores may stand, numbers only where
one side has no names.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isotune.data.class_index import TRUTHS, WHOLE, Label, NameIndex, find_class, listed, place_of
from isotune.data.sources.class_labels import fold
from isotune.io.errors import UserError

MOST_CLASSES = 1_000  # of words: more are texts that somebody took for classes

MISSING = frozenset(("na", "n/a", "nan", "null", "none", "nil", "-", "?", "#n/a", "<na>"))

_PADDED = re.compile(r"0\d+", re.A)  # a code such as 007


@dataclass(frozen=True)
class ClassColumn:
    """The classes of a column of labels."""

    labels: np.ndarray  # int32 [rows]
    names: tuple[str, ...] | None  # by class; None where the data and the recipe have none
    # whether the numbers are the data's own: those of words, in the order of the alphabet, are not
    numbered: bool = True
    spellings: int = 0  # words that were counted with another one, because they differ in case or spaces
    by_place: bool = False  # whether a label was taken for the place of a known class, which no name confirms


def resolve(
    labels: Sequence[Label],
    *,
    where: Callable[[int], str],
    known: Sequence[str] | None = None,
    own: Sequence[Sequence[str]] = (),
    count: int | None = None,
    part_of: Callable[[int], int] = lambda _: 0,
) -> ClassColumn:
    """The classes of a column's labels.

    `known` are the names of the classes in their order, which the recipe, the training data or the model say. `own` are
    the names that the data itself lists, such as a ClassLabel's, and further lists of names of the same classes; the
    first list whose names are known counts. Without both, words become classes in the order of the alphabet. `count` is
    the number of classes, where it is known, and 0 where numbers are never names. `where`
    names a row, counted from 0, and `part_of` says which source of a mixture it is of. UserError where a label is no
    class of these.
    """
    if not own:
        labels = _as_numbers(labels)
    if known is not None:
        classes, by_place = _aligned(labels, NameIndex(known), own, where)
        return ClassColumn(classes, tuple(known), by_place=by_place)
    kinds = [bool if isinstance(label, bool) else type(label) for label in labels]
    _check_missing(labels, where)
    if own:
        return ClassColumn(_aligned(labels, NameIndex(own[0]), own[:1], where)[0], tuple(own[0]))
    rarest = min(dict.fromkeys(kinds), key=kinds.count)
    row = kinds.index(rarest)
    other = next((other for other, kind in enumerate(kinds) if kind is not rarest), None)
    if other is not None:
        raise _mixed(labels, row, other, where)
    if kinds[0] is bool:
        return ClassColumn(np.array(labels, np.int32), ("false", "true"))
    if kinds[0] is str:
        words = [str(label) for label in labels]
        if pair := _of_other_kinds(words, part_of):
            raise _mixed(labels, *pair, where)
        return _of_words(words, where)
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


def _mixed(labels: Sequence[Label], row: int, other: int, where: Callable[[int], str]) -> UserError:
    return UserError(
        f"{where(row)} holds {labels[row]!r} and {where(other)} {labels[other]!r}: a class is a whole number, a word, "
        "or true or false, and these are not mixed (label_names says which classes there are)"
    )


def _of_other_kinds(words: Sequence[str], part_of: Callable[[int], int]) -> tuple[int, int] | None:
    """Rows of two sources of a mixture, the labels of one of which are numbers alone, or true and false alone.

    In one file, digits beside words may be names. Two sources that call their classes otherwise are as many classes
    more, unless they share one. None where there are no such sources.
    """
    kinds = {word: int if WHOLE.fullmatch(word) else bool if word.lower() in TRUTHS else str for word in set(words)}
    if len(set(kinds.values())) < 2:
        return None
    parts: dict[int, dict[str, int]] = {}  # the first row of each label
    for row, word in enumerate(words):
        parts.setdefault(part_of(row), {}).setdefault(word, row)
    for own in parts.values():
        kind = kinds[next(iter(own))]
        if kind is str or any(kinds[word] is not kind for word in own):
            continue
        others = [other for other in parts.values() if any(kinds[word] is not kind for word in other)]
        if others and not any(own.keys() & other.keys() for other in others):
            word = next(word for word in others[0] if kinds[word] is not kind)
            return next(iter(own.values())), others[0][word]
    return None


def _as_numbers(labels: Sequence[Label]) -> Sequence[Label]:
    """Texts that are whole numbers of a column of classes, as numbers, also beside numbers.

    Codes such as 01 and 10 keep their zeros, unless they are only another spelling of numbers that stand there too.
    """
    if not all(type(label) is int or (isinstance(label, str) and WHOLE.fullmatch(label)) for label in labels):
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
    if missing and len(missing) < len(distinct) and all(map(WHOLE.fullmatch, distinct - missing)):
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
) -> tuple[np.ndarray, bool]:
    """The class of each label among known names, int32 [rows], and whether one was found by its place alone."""
    distinct = {_key(label): label for label in labels}
    by_place = False
    if own:
        listed_at = NameIndex(own[0])
        places = {key: place_of(label, listed_at) for key, label in distinct.items()}
        tables = [
            {key: None if place is None else known.find(names[place]) for key, place in places.items()} for names in own
        ]
    else:
        found = {key: find_class(label, known) for key, label in distinct.items()}
        tables = [{key: place for key, (place, _) in found.items()}]
        by_place = not all(named for _, named in found.values())
    table = next((each for each in tables if None not in each.values()), tables[0])
    if not own and known.numbers:
        meant = _by_numbers_in_names(labels, distinct, table, known, where)
        table, by_place = meant or table, by_place and meant is None
    classes = [table[_key(label)] for label in labels]
    if None in classes:
        row = classes.index(None)
        of_data = own[0] if own else sorted(map(str, distinct.values()))
        raise UserError(
            f"{where(row)} is of class {str(labels[row])[:60]!r}: the data has the classes {listed(of_data)}, and they "
            f"are to be {listed(known.names)}"
        )
    return np.array(classes, np.int32), by_place


def _by_numbers_in_names(
    labels: Sequence[Label], distinct: dict[Any, Label], table: dict[Any, int | None], known: NameIndex, where: Any
) -> dict[Any, int | None] | None:
    """The table of places where numbers are those that the names have, such as 5 of `5 stars`; None where they are not.

    UserError where they may be these, or the places of the classes counted from 0, and that is not the same.
    """
    if not all(type(label) is int or (isinstance(label, str) and WHOLE.fullmatch(label)) for label in labels):
        return None
    meant = {key: known.numbers.get(int(float(label))) for key, label in distinct.items()}
    if None in meant.values():
        return None
    if meant != table and None not in table.values():
        row = next(row for row, label in enumerate(labels) if meant[_key(label)] != table[_key(label)])
        one, other = (known.names[each[_key(labels[row])] or 0] for each in (meant, table))
        raise UserError(
            f"{where(row)} is of class {labels[row]}, which may be {one!r} or, counted from 0, {other!r}: write the "
            "names of the classes in the data"
        )
    return meant


def _key(label: Label) -> Any:
    return (type(label), label)  # True == 1 in Python
