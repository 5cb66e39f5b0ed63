"""The rows of labelled data as documents: texts tokenised in threads, with their classes and ids."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from isotune.config.recipes import AUTO, NO_IDS
from isotune.data.classification.classes import ClassColumn, Label, label_of, resolve
from isotune.data.classification.labels import ClassificationSettings, labels_of
from isotune.data.contents import clean, contents_of
from isotune.data.documents import Documents
from isotune.data.pieces import DocumentFiles, in_threads
from isotune.data.sources.source import Row, Source, kind_of_value, surrogate_fault
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError, shown

Id = int | str

ID_FIELD = "id"  # the column that is taken for ids where the recipe names none


@dataclass(frozen=True)
class LabelledDocuments:
    """The rows of a source as documents, and what was found about their classes and ids."""

    documents: Documents
    class_names: tuple[str, ...] | None = None
    numbered: bool = True  # whether the classes' numbers are the data's own: those of words are not
    notes: tuple[str, ...] = ()  # lines for the user


@dataclass(frozen=True)
class _Texts:
    """Rows that were read together; the class of each where rules or chance decide it."""

    texts: list[str]
    labels: np.ndarray | None


class _RowReader:
    """Reads the texts of a source, batch by batch, and keeps the labels and ids of all rows."""

    def __init__(self, source: Source, settings: ClassificationSettings) -> None:
        self.source, self.settings = source, settings
        self.columns: dict[str, str] = {}
        self.labels: list[Label] = []
        self.ids: list[Any] = []

    def batches(self) -> Iterator[_Texts]:
        """All rows; UserError names the row that lacks a text, class or id."""
        source, settings = self.source, self.settings
        for rows in source.batches():
            columns = self.columns = self.columns or _columns(settings)
            wanted = set(columns.values())
            for number, row in rows:
                if not wanted <= row.keys():
                    key, column = next((key, column) for key, column in columns.items() if column not in row)
                    raise source.lacks(number, row, column, key)
            texts = [_text(row, source, number, settings.dataset_text_field) for number, row in rows]
            of_rules = None
            if column := columns.get("dataset_label_field"):
                self.labels += [_label(row, source, number, column) for number, row in rows]
            else:
                of_rules = labels_of(texts, settings)
            if settings.dataset_id_field == AUTO:
                self.ids += [row[ID_FIELD] for _, row in rows if ID_FIELD in row]
            elif column := columns.get("dataset_id_field"):
                self.ids += [_id(row, source, number, column) for number, row in rows]
            yield _Texts(texts, of_rules)


def _encode(encoder: TextEncoder, settings: ClassificationSettings, batch: _Texts) -> Documents:
    cleaned = [clean(text) for text in batch.texts]
    chosen = cleaned if settings.clean_text else batch.texts
    part = encoder.encode(chosen, settings.max_seq_length, settings.overlong, batch.labels)
    marked = np.array([text != raw for text, raw in zip(cleaned, batch.texts, strict=True)])
    return replace(part, columns={"contents": contents_of(batch.texts), **part.columns, "marked": marked})


def read_documents(
    source: Source, encoder: TextEncoder, settings: ClassificationSettings, folder: Path, *, show_progress: bool
) -> LabelledDocuments:
    """All rows of a source, tokenized into files of `folder`, with their classes.

    UserError names the row that lacks a text, class or id. The columns are `ids`, the data set's own or the numbers of
    the rows; `contents` (isotune.data.contents); the encoder's `whole_lengths`; and `marked`, bool: whether the text
    holds HTML breaks, entities or escapes.
    """
    reader, made = _RowReader(source, settings), DocumentFiles(folder)
    with closing(made), tqdm(desc="preparing", unit=" documents", disable=not show_progress) as bar:
        for _, part in in_threads(reader.batches(), partial(_encode, encoder, settings)):
            made.add(part)
            bar.update(len(part))
        documents = made.documents()
    columns, labels, ids = reader.columns, reader.labels, reader.ids
    classes = ClassColumn(documents.targets, settings.known_names)
    if column := columns.get("dataset_label_field"):
        own_names = source.class_names.get(column, ())
        classes = resolve(labels, where=source.where, known=settings.known_names, own=own_names)
    documents, notes = replace(documents, targets=classes.labels), list[str]()
    if classes.spellings:
        notes.append(f"{classes.spellings} names of classes differ from another one in case or spaces: they are one")
    numbers = np.arange(len(documents))
    if settings.dataset_id_field != AUTO:
        found: np.ndarray | str = _as_ids(ids, numbers, source)
    else:
        found = _own_ids(ids, numbers, source)
    if isinstance(found, str):
        notes.append(found)
        found = numbers
    documents = replace(documents, source_rows=numbers, columns={"ids": found, **documents.columns})
    return LabelledDocuments(documents, classes.names, classes.numbered, tuple(notes))


def _columns(settings: ClassificationSettings) -> dict[str, str]:
    """The columns that every row must have, by the recipe's key for each."""
    columns = {"dataset_text_field": settings.dataset_text_field}
    if settings.label_source == "column":
        columns["dataset_label_field"] = settings.dataset_label_field
    if settings.dataset_id_field not in (AUTO, NO_IDS):
        columns["dataset_id_field"] = settings.dataset_id_field
    return columns


def _own_ids(ids: list[Any], numbers: np.ndarray, source: Source) -> np.ndarray | str:
    """The ids of a column that nobody asked for; where it does not name each row once, the sentence that says so."""
    if not ids or len(ids) < len(numbers):
        return numbers if not ids else f"rows are numbered: not every row of {source.name} has the column {ID_FIELD!r}"
    kind = cast(type[object], type(ids[0]))
    fault = None
    if kind not in (int, str):
        fault = f"it holds {kind_of_value(ids[0])} in row 1"
    elif len(set(ids)) < len(ids):
        first: dict[Any, int] = {}
        row = next(row for row, own_id in enumerate(ids) if first.setdefault(own_id, row) != row)
        fault = f"{str(ids[row])[:40]!r} stands in row {first[ids[row]] + 1} and in row {row + 1}"
    elif any(type(own_id) is not kind for own_id in ids):
        row = next(row for row, own_id in enumerate(ids) if type(own_id) is not kind)
        fault = f"it holds {kind_of_value(ids[0])} in row 1 and {kind_of_value(ids[row])} in row {row + 1}"
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


def _text(row: Row, source: Source, number: int, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{source.where(number)}, column {column!r}, holds {kind_of_value(text)}, not a text")
    if fault := surrogate_fault(text):
        raise UserError(f"{source.where(number)}, column {column!r}, {fault}")
    return text


def _label(row: Row, source: Source, number: int, column: str) -> Label:
    names = source.class_names.get(column, ())
    try:
        label = label_of(row[column], names[0] if names else ())
        return sys.intern(label) if isinstance(label, str) else label  # a million rows share a few words
    except ValueError as error:
        raise UserError(
            f"{source.where(number)}, column {column!r}, holds {error}: a class is a whole number from 0, a word, or "
            "true or false"
        ) from None


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
