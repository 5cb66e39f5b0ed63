"""Reads labelled texts from a source and names the row of whatever is not one: a text, a class, an id of its own."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from isotune.data.sources.source import Row, Source, kind_of_value, surrogate_fault
from isotune.io.errors import UserError

ID_FIELD = "id"  # the column that is taken for ids where the recipe names none

Id = int | str


@dataclass(frozen=True)
class Columns:
    """Which columns are read.

    Attributes:
        text: holds the texts.
        label: holds the classes; None where they are not read.
        id: holds the ids; None takes the column `id` where the first row has one.
    """

    text: str
    label: str | None
    id: str | None


@dataclass(frozen=True)
class LabelledRows:
    """Rows that were read together: texts, classes (None where not read) and ids (None where there are none)."""

    texts: list[str]
    labels: list[int] | None
    ids: list[Id] | None


def read_labelled(source: Source, columns: Columns) -> Iterator[LabelledRows]:
    """The rows of a source, batch by batch.

    Raises:
        UserError: a column is missing, or a cell holds no text, no class or no id; the sentence names the row.
    """
    needed: dict[str, str] = {}
    for rows in source.batches():
        needed = needed or _needed(rows[0][1], columns)
        for number, row in rows:
            for column, key in needed.items():
                if column not in row:
                    held = ", ".join(row) or "none"
                    raise UserError(
                        f"{source.where(number)} lacks the column {column!r}; it has {held}: name it by {key}"
                    )
        id_column = next((column for column, key in needed.items() if key == "dataset_id_field"), None)
        yield LabelledRows(
            texts=[_text(row, source, number, columns.text) for number, row in rows],
            labels=[_label(row, source, number, columns.label) for number, row in rows] if columns.label else None,
            ids=[_id(row, source, number, id_column) for number, row in rows] if id_column else None,
        )


def _needed(first: Row, columns: Columns) -> dict[str, str]:
    """The columns that every row must have, and the recipe's key for each."""
    id_column = columns.id or (ID_FIELD if ID_FIELD in first else None)
    keys = {
        columns.text: "dataset_text_field",
        columns.label: "dataset_label_field",
        id_column: "dataset_id_field",
    }
    return {column: key for column, key in keys.items() if column is not None}


def texts_of(source: Source, column: str, source_rows: np.ndarray) -> Iterator[str]:
    """The texts of some rows of a source as they stand there, in the order of the source.

    Args:
        source_rows: int64 [texts], rising.
    """
    wanted = iter(source_rows.tolist())
    following = next(wanted, None)
    for number, row in enumerate(source.rows()):
        if number == following:
            yield row[column]
            following = next(wanted, None)
            if following is None:
                return


def as_ids(ids: list[Id], documents: int, source: Source) -> np.ndarray:
    """Ids as an array, int64 or text [documents]; the numbers of the rows where the data set has none.

    Raises:
        UserError: numbers and texts are mixed, a number has more than 64 bits, or an id stands twice.
    """
    if not ids:
        return np.arange(documents)
    kind = type(ids[0])
    first_row: dict[Id, int] = {}
    for number, own_id in enumerate(ids):
        if type(own_id) is not kind:
            raise UserError(
                f"{source.where(number)} has the id {own_id!r} and row 1 has {ids[0]!r}: "
                "numbers and texts are not mixed"
            )
        if own_id in first_row:
            raise UserError(
                f"{source.where(number)} has the id {own_id!r}, and so has row {first_row[own_id] + 1}: an id stands "
                "once (dataset_id_field names the column)"
            )
        first_row[own_id] = number
    return np.array(ids, np.int64 if kind is int else np.str_)


def _text(row: Row, source: Source, number: int, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{source.where(number)}, column {column!r}, holds {kind_of_value(text)}, not a text")
    if fault := surrogate_fault(text):
        raise UserError(f"{source.where(number)}, column {column!r}, {fault}")
    return text


def _label(row: Row, source: Source, number: int, column: str) -> int:
    label = row[column]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 2**31:
        value = "null" if label is None else repr(label)[:40]
        raise UserError(f"{source.where(number)}, column {column!r}, holds {value}: a class is a whole number from 0")
    return label


def _id(row: Row, source: Source, number: int, column: str) -> Id:
    own_id = row[column]
    if isinstance(own_id, str):
        return _text(row, source, number, column)
    if isinstance(own_id, bool) or not isinstance(own_id, int) or abs(own_id) >= 2**63:
        value = repr(own_id)[:40] if isinstance(own_id, int | float) else kind_of_value(own_id)
        raise UserError(
            f"{source.where(number)}, column {column!r}, holds {value}: an id is a whole number of 64 bits or a text "
            "(dataset_id_field names the column)"
        )
    return own_id
