"""What the cells of a label column are to the model: classes, numbers of a regression, or sets of labels.

Which of the three is seen by the cells where nobody says it: lists are sets of labels, and numbers that are not whole
are those of a regression.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

import numpy as np

from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.data.class_index import NameIndex, label_of
from isotune.data.classification.classes import MOST_CLASSES, ClassColumn, resolve
from isotune.data.contents import written_list
from isotune.data.sources.source import told
from isotune.io.errors import UserError, shown

Where = Callable[[int], str]  # how a message names a row, counted from 0

FRACTIONS = 0.1  # of the cells that are no whole numbers make a column of numbers one of a regression
SEPARATORS = ("|", ";", ",")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.A)


@dataclass(frozen=True)
class Targets:
    """The labels of a data set, as its documents hold them."""

    task_type: str
    values: np.ndarray  # int32 [rows], float64 [rows] or uint8 [rows, labels]; see Documents.targets
    names: tuple[str, ...] | None = None
    numbered: bool = True  # whether the numbers of the classes are the data's own
    notes: tuple[str, ...] = ()
    by_place: bool = False  # whether a label was taken for the place of a known class, which no name confirms

    @classmethod
    def of_classes(cls, column: ClassColumn) -> "Targets":
        """Those of a text that has one class."""
        notes = (
            (f"{column.spellings} names of classes differ from another one in case or spaces: they are one",)
            if column.spellings
            else ()
        )
        return cls(SINGLE_LABEL, column.labels, column.names, column.numbered, notes, column.by_place)


def type_of(cells: Sequence[Any]) -> str:
    """The kind of labels that cells show."""
    if any(map(_is_list, cells)) or all(written_list(cell) is not None for cell in cells):
        return MULTI_LABEL
    fractions: list[float] = []
    for cell in cells:
        number = _number_in(cell)
        if number is None:
            return SINGLE_LABEL
        if not number.is_integer():
            fractions.append(number)
    is_regression = len(set(fractions)) > 1 and len(fractions) >= FRACTIONS * len(cells)
    return REGRESSION if is_regression else SINGLE_LABEL


def numbers_of(cells: Sequence[Any], where: Where, column: str) -> Targets:
    """The numbers of a regression; UserError names the row whose cell is none, or is not finite."""
    values = np.zeros(len(cells))
    for row, cell in enumerate(cells):
        number = _number_in(cell)
        if number is None:
            raise UserError(
                f"{where(row)}, column {column!r}, holds {told(cell)}: task_type regression takes a finite number"
            )
        values[row] = number
    return Targets(REGRESSION, values)


def labels_of_rows(
    cells: Sequence[Any],
    where: Where,
    column: str,
    *,
    known: Sequence[str] | None = None,
    own: Sequence[Sequence[str]] = (),
    count: int | None = None,
    part_of: Callable[[int], int] = lambda _: 0,
) -> Targets:
    """The labels of each row, from lists of names or numbers; or from texts with one clear separator.

    Numbers are places among `known`, or `own`, names; lists of 0 and 1 of one length have a place for each label.
    `count` is the number of labels, where numbers have no names, and `part_of` is that of `resolve`. UserError names
    the row of a cell that is no such list, or has a label that is not known.
    """
    notes: list[str] = []
    lists = _as_lists(cells, where, column, known or (own[0] if own else None), notes)
    if not own and _are_vectors(lists, len(known) if known else count):
        return _of_vectors(lists, where, column, known, count)
    flat: list[Any] = []
    rows: list[int] = []
    for row, labels in enumerate(lists):
        for label in labels:
            try:
                flat.append(label_of(label, own[0] if own else ()))
            except ValueError as error:
                raise UserError(
                    f"{where(row)}, column {column!r}, has the label {error}: it is a word or a whole number from 0"
                ) from None
            rows.append(row)
    if not flat:
        raise UserError(f"no row of the column {column!r} has a label: there is nothing to learn")
    classes = resolve(
        flat,
        where=lambda item: where(rows[item]),
        known=known,
        own=own,
        count=0,
        part_of=lambda item: part_of(rows[item]),
    )
    if classes.names is None and count is None and classes.labels.max() >= MOST_CLASSES:
        item = int(classes.labels.argmax())
        raise UserError(
            f"{where(rows[item])}, column {column!r}, has the label {classes.labels[item]}: labels are numbered from 0 "
            f"and fewer than {MOST_CLASSES:,}; num_labels or label_names says that there are so many"
        )
    labels_there = len(classes.names) if classes.names else max(count or 0, int(classes.labels.max()) + 1)
    if labels_there < 2:
        raise UserError(f"the column {column!r} has one label, {flat[0]!r}: task_type multi_label needs two or more")
    if count is not None and labels_there > count:
        item = int(np.argmax(classes.labels >= count))
        largest = f"{classes.labels[item]}, and there are {count}: 0 to {count - 1}"
        raise UserError(f"{where(rows[item])} has the label {largest}")
    values = np.zeros((len(lists), labels_there), np.uint8)
    values[rows, classes.labels] = 1
    if classes.spellings:
        notes.append(f"{classes.spellings} names of labels differ from another one in case or spaces: they are one")
    return Targets(MULTI_LABEL, values, classes.names, classes.numbered, tuple(notes), classes.by_place)


def labels_in_columns(rows: Sequence[dict[str, Any]], names: Sequence[str], where: Where) -> Targets:
    """The labels of each row from a column of 0 and 1 for each; UserError names the row and column of another value."""
    values = np.zeros((len(rows), len(names)), np.uint8)
    for number, row in enumerate(rows):
        for place, name in enumerate(names):
            value = _bit(row[name])
            if value is None:
                raise UserError(f"{where(number)}, column {name!r}, holds {shown(row[name])}: a label's cell is 0 or 1")
            values[number, place] = value
    return Targets(MULTI_LABEL, values, tuple(names))


def are_numbers(cells: Sequence[Any]) -> bool:
    """Whether each cell holds a finite number."""
    return all(_number_in(cell) is not None for cell in cells)


def is_bit(cell: Any) -> bool:
    """Whether a cell is 0 or 1, or true or false."""
    return _bit(cell) is not None


def _bit(cell: Any) -> int | None:
    if isinstance(cell, str):
        return {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "true": 1, "false": 0}.get(cell.strip().lower())
    return int(cell) if isinstance(cell, bool | int | float) and cell in (0, 1) else None


def _number_in(cell: Any) -> float | None:
    """The finite number in a cell; None where there is none."""
    if isinstance(cell, bool):
        return None
    if isinstance(cell, str):
        text = cell.strip()
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
    else:
        is_number = isinstance(cell, float | Decimal) or (isinstance(cell, int) and abs(cell) < 2**1023)
        number = float(cell) if is_number else math.nan
    return number if math.isfinite(number) else None


def _is_list(cell: Any) -> bool:
    return isinstance(cell, list | tuple | np.ndarray)


def _as_lists(
    cells: Sequence[Any], where: Where, column: str, known: Sequence[str] | None, notes: list[str]
) -> list[list[Any]]:
    """The labels that each cell lists, not yet known by number; `notes` gets what was guessed."""
    written = [written_list(cell) for cell in cells]
    if not any(_is_list(cell) for cell in cells) and all(found is None for found in written):
        return _separated(cells, where, column, known, notes)
    lists: list[list[Any]] = []
    for row, (cell, found) in enumerate(zip(cells, written, strict=True)):
        if found is None and not _is_list(cell):
            raise UserError(
                f"{where(row)}, column {column!r}, holds {told(cell)}, and other rows a list: [] is of no label"
            )
        lists.append(list(cell) if found is None else found)
    return lists


def _separated(
    cells: Sequence[Any], where: Where, column: str, known: Sequence[str] | None, notes: list[str]
) -> list[list[Any]]:
    """The labels of texts such as `a|b`: by the separator with which all are known, else by the only one there is."""
    for row, cell in enumerate(cells):
        if not isinstance(cell, str) or not cell.strip():
            what = "an empty text" if isinstance(cell, str) else told(cell)
            raise UserError(
                f"{where(row)}, column {column!r}, holds {what}: task_type multi_label needs a list of labels in each "
                "row, and [] is of no label"
            )
    texts = cast("Sequence[str]", cells)
    used = [mark for mark in SEPARATORS if any(mark in text for text in texts)]
    if known is not None:
        names = NameIndex(known)
        fits = [m for m in used if all(names.find(part) is not None for text in texts for part in text.split(m))]
        used = fits or ([] if all(names.find(text) is not None for text in texts) else used)
    if len(used) > 1:
        row = next(row for row, text in enumerate(texts) if any(mark in text for mark in used))
        marks = " and ".join(map(repr, used))
        raise UserError(
            f"{where(row)}, column {column!r}, holds {shown(cells[row])}: {marks} could separate labels; write lists, "
            'such as ["a", "b"], or say label_names'
        )
    if not used:
        return [[text] for text in texts]
    notes.append(f"labels of the column {column!r} are separated at {used[0]!r}")
    return [[part.strip() for part in text.split(used[0])] for text in texts]


def _are_vectors(lists: Sequence[Sequence[Any]], count: int | None) -> bool:
    """Whether lists have a 0 or 1 for each label, and not the labels: those of one row differ from each other."""
    if not all(type(one) in (bool, int, float) and one in (0, 1) for labels in lists for one in labels):
        return False
    if any(type(one) is float for labels in lists for one in labels):
        return True
    lengths = {len(labels) for labels in lists}
    in_places = len(lengths) == 1 and max(lengths) > 1 and count in (None, *lengths)
    return in_places or any(len({*labels}) < len(labels) for labels in lists)


def _of_vectors(
    lists: list[list[Any]], where: Where, column: str, names: Sequence[str] | None, count: int | None
) -> Targets:
    expected = len(names) if names else count or len(lists[0])
    if expected < 2:
        raise UserError(f"the column {column!r} has lists of one number: task_type multi_label needs two")
    for row, labels in enumerate(lists):
        if len(labels) != expected:
            others = f"there are {expected} labels" if names or count else f"{where(0)} has {expected}"
            raise UserError(f"{where(row)}, column {column!r}, has {len(labels)} numbers of 0 and 1, and {others}")
    values = np.array(lists, np.float64).astype(np.uint8)
    return Targets(MULTI_LABEL, values, tuple(names) if names else None, by_place=bool(names))
