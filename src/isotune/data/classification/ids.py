"""The ids of a data set's rows, by which predictions name them: of a column that is asked for, or found."""

from typing import Any, cast

import numpy as np

from isotune.config.recipes import AUTO, NO_IDS
from isotune.data.sources.source import Row, Source, kind_of_value, surrogate_fault
from isotune.io.errors import UserError, shown

Id = int | str

ID_FIELD = "id"  # the column that is taken for ids where the recipe names none


def ids_in(rows: list[tuple[int, Row]], source: Source, field: str, column: str | None) -> list[Any]:
    """The cells of some rows' ids: of `column`, or of ID_FIELD where `field` leaves it open."""
    if field == AUTO:
        return [row[ID_FIELD] for _, row in rows if ID_FIELD in row]
    return [] if column is None else [_id(row, source, number, column) for number, row in rows]


def ids_of_all(ids: list[Any], numbers: np.ndarray, source: Source, field: str) -> tuple[np.ndarray, str | None]:
    """The ids of all rows, int64 or text [rows], and where they are passed over the sentence that says so."""
    found = _own_ids(ids, numbers, source) if field == AUTO else _as_ids(ids, numbers, source)
    return (numbers, found) if isinstance(found, str) else (found, None)


def _own_ids(ids: list[Any], numbers: np.ndarray, source: Source) -> np.ndarray | str:
    """The ids of a column that nobody asked for; where it does not name each row once, the sentence that says so."""
    if not ids or len(ids) < len(numbers):
        return numbers if not ids else f"rows are numbered: not every row of {source.name} has the column {ID_FIELD!r}"
    kind = cast(type[object], type(ids[0]))
    fault = None
    if kind not in (int, str):
        fault = f"it holds {kind_of_value(ids[0])} in row 1"
    elif any(type(own_id) is not kind for own_id in ids):
        row = next(row for row, own_id in enumerate(ids) if type(own_id) is not kind)
        fault = f"it holds {kind_of_value(ids[0])} in row 1 and {kind_of_value(ids[row])} in row {row + 1}"
    elif len(set(ids)) < len(ids):
        first: dict[Any, int] = {}
        row = next(row for row, own_id in enumerate(ids) if first.setdefault(own_id, row) != row)
        fault = f"{str(ids[row])[:40]!r} stands in row {first[ids[row]] + 1} and in row {row + 1}"
    elif (kind is int and max(map(abs, cast(list[int], ids))) >= 2**63) or (
        kind is str and any(map(surrogate_fault, ids))
    ):
        fault = "it holds numbers beyond 64 bits, or broken texts"
    if fault is not None:
        return (
            f"rows are numbered: the column {ID_FIELD!r} of {source.name} does not name each row once ({fault}); "
            f"dataset_id_field: COLUMN asks for one, and {NO_IDS} for none"
        )
    return np.array(ids, np.int64 if kind is int else np.str_)


def _as_ids(ids: list[Id], numbers: np.ndarray, source: Source) -> np.ndarray:
    """Ids as an array, int64 or text [documents]; the numbers of the rows where the recipe asks for none."""
    if not ids:
        return numbers
    kind = type(ids[0])
    first_row: dict[Id, int] = {}
    for number, own_id in enumerate(ids):
        if type(own_id) is not kind:
            raise UserError(
                f"{source.where(number)} has the id {shown(own_id, 30)} and row 1 has {shown(ids[0], 30)}: "
                "numbers and texts are not mixed"
            )
        if own_id in first_row:
            raise UserError(
                f"{source.where(number)} has the id {shown(own_id)}, and so has row {first_row[own_id] + 1}: "
                f"an id stands once (dataset_id_field names the column; {NO_IDS} numbers the rows instead)"
            )
        first_row[own_id] = number
    return np.array(ids, np.int64 if kind is int else np.str_)


def _id(row: Row, source: Source, number: int, column: str) -> Id:
    own_id = row[column]
    if isinstance(own_id, str):
        if fault := surrogate_fault(own_id):
            raise UserError(f"{source.where(number)}, column {column!r}, {fault}")
        return own_id
    if isinstance(own_id, bool) or not isinstance(own_id, int) or abs(own_id) >= 2**63:
        value = repr(own_id)[:40] if isinstance(own_id, int | float) else kind_of_value(own_id)
        raise UserError(
            f"{source.where(number)}, column {column!r}, holds {value}: an id is a whole number of 64 bits or a text "
            "(dataset_id_field names the column)"
        )
    return own_id
