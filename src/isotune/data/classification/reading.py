"""The rows of a data set as documents: one text or two, what they are labelled with, and their ids."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from isotune.config.recipes import AUTO, NO_IDS
from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.data.class_index import Label, label_of
from isotune.data.classification.classes import ClassColumn, resolve
from isotune.data.classification.ids import ids_in, ids_of_all
from isotune.data.classification.labels import ClassificationSettings, labels_of
from isotune.data.classification.pairs import joined
from isotune.data.classification.targets import Targets, labels_in_columns, labels_of_rows, numbers_of, type_of
from isotune.data.contents import clean, contents_of
from isotune.data.documents import Documents
from isotune.data.pieces import DocumentFiles, in_threads
from isotune.data.sources.source import Row, Source, kind_of_value, surrogate_fault
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError

TEXTS = ("dataset_text_field", "dataset_text_pair_field")


@dataclass(frozen=True)
class LabelledDocuments:
    """The rows of a source as documents, and what was found about their classes and ids."""

    documents: Documents
    targets: Targets
    notes: tuple[str, ...] = ()  # lines for the user


@dataclass(frozen=True)
class _Texts:
    """Rows that were read together: a text of each, or the two of a pair; and its class, where the text decides it."""

    of_each: list[list[str]]
    labels: np.ndarray | None


class _RowReader:
    """Reads the texts of a source, batch by batch, and keeps the cells of labels and the ids of all rows."""

    def __init__(self, source: Source, settings: ClassificationSettings) -> None:
        self.source, self.settings = source, settings
        self.columns: dict[str, str] = {}
        self.label_columns: tuple[str, ...] = ()  # of 0 and 1, one for each label
        self.cells: list[Any] = []
        self.ids: list[Any] = []

    def batches(self) -> Iterator[_Texts]:
        """All rows; UserError names the row that lacks a text, class or id."""
        source, settings = self.source, self.settings
        for rows in source.batches():
            self.label_columns = label_columns = self.label_columns or _label_columns(rows[0][1], settings)
            self.columns = columns = self.columns or _columns(settings, label_columns)
            wanted = [*columns.items(), *(("label_names", name) for name in label_columns)]
            names = {column for _, column in wanted}
            for number, row in rows:
                if not names <= row.keys():
                    key, column = next((key, column) for key, column in wanted if column not in row)
                    raise source.lacks(number, row, column, key)
            of_each = [
                [_text(row, source, number, columns[key]) for number, row in rows] for key in TEXTS if key in columns
            ]
            of_rules = None
            if label_columns:
                self.cells += [{name: row[name] for name in label_columns} for _, row in rows]
            elif column := columns.get("dataset_label_field"):
                # a million rows share a few words
                cells = (row[column] for _, row in rows)
                self.cells += [sys.intern(cell) if type(cell) is str else cell for cell in cells]
            else:
                of_rules = labels_of(joined(*of_each), settings)
            self.ids += ids_in(rows, source, settings.dataset_id_field, columns.get("dataset_id_field"))
            yield _Texts(of_each, of_rules)


def encode_texts(
    encoder: TextEncoder,
    settings: ClassificationSettings,
    of_each: Sequence[Sequence[str]],
    labels: np.ndarray | None = None,
) -> Documents:
    """Texts as the model reads them: one column of texts, or the two of pairs; `labels` are of single texts only."""
    if len(of_each) == 1:
        return encoder.encode(of_each[0], settings.max_seq_length, settings.overlong, labels)
    return encoder.encode_pairs(of_each[0], of_each[1], settings.max_seq_length, settings.overlong)


def _encode(encoder: TextEncoder, settings: ClassificationSettings, batch: _Texts) -> Documents:
    texts = joined(*batch.of_each)
    cleaned = [[clean(text) for text in column] for column in batch.of_each]
    part = encode_texts(encoder, settings, cleaned if settings.clean_text else batch.of_each, batch.labels)
    marked = np.array([text != raw for text, raw in zip(joined(*cleaned), texts, strict=True)])
    return replace(part, columns={"contents": contents_of(texts), **part.columns, "marked": marked})


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
    columns, label_columns, cells, ids = reader.columns, reader.label_columns, reader.cells, reader.ids
    if label_columns:
        targets = labels_in_columns(cells, label_columns, source.where)
    elif column := columns.get("dataset_label_field"):
        targets = read_targets(cells, source, column, settings)
    else:
        targets = Targets.of_classes(ClassColumn(documents.targets, settings.known_names))
    documents, notes = replace(documents, targets=targets.values), list(targets.notes)
    numbers = np.arange(len(documents))
    own_ids, passed_over = ids_of_all(ids, numbers, source, settings.dataset_id_field)
    notes += [passed_over] if passed_over else []
    documents = replace(documents, source_rows=numbers, columns={"ids": own_ids, **documents.columns})
    return LabelledDocuments(documents, targets, tuple(notes))


def read_targets(cells: list[Any], source: Source, column: str, settings: ClassificationSettings) -> Targets:
    """The labels of a column, of the kind that the settings say or the cells show; UserError names a wrong row."""
    own, known = source.class_names.get(column, ()), settings.known_names
    task_type = type_of(cells) if settings.task_type == AUTO else settings.task_type
    if task_type == REGRESSION and settings.task_type == AUTO and (own or known or settings.num_labels):
        task_type = SINGLE_LABEL  # the classes are known, so a number that is none is a mistake
    if task_type == REGRESSION:
        targets = numbers_of(cells, source.where, column)
        holds = "numbers that are not whole"
    elif task_type == MULTI_LABEL:
        count = settings.num_labels
        targets = labels_of_rows(cells, source.where, column, known=known, own=own, count=count, part_of=source.part_of)
        holds = "lists of labels"
    else:
        labels = [_label(cell, source, number, column) for number, cell in enumerate(cells)]
        count = settings.num_labels
        return Targets.of_classes(
            resolve(labels, where=source.where, known=known, own=own, count=count, part_of=source.part_of)
        )
    if settings.task_type == AUTO:
        note = f"nobody said so: the column {column!r} holds {holds}, so task_type is {task_type}"
        return replace(targets, notes=(*targets.notes, note))
    return targets


def _label_columns(first: Row, settings: ClassificationSettings) -> tuple[str, ...]:
    """The columns of 0 and 1 that hold the labels: those of their names, where there is no column of all labels."""
    names = settings.label_names
    if settings.task_type != MULTI_LABEL or not names or settings.dataset_label_field in first:
        return ()
    return names if any(name in first for name in names) else ()


def _columns(settings: ClassificationSettings, label_columns: Sequence[str]) -> dict[str, str]:
    """The columns that every row must have, by the recipe's key for each; those of `label_columns` left out."""
    columns = {"dataset_text_field": settings.dataset_text_field}
    if settings.dataset_text_pair_field is not None:
        columns["dataset_text_pair_field"] = settings.dataset_text_pair_field
    if settings.label_source == "column" and not label_columns:
        columns["dataset_label_field"] = settings.dataset_label_field
    if settings.dataset_id_field not in (AUTO, NO_IDS):
        columns["dataset_id_field"] = settings.dataset_id_field
    return columns


def _text(row: Row, source: Source, number: int, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{source.where(number)}, column {column!r}, holds {kind_of_value(text)}, not a text")
    if fault := surrogate_fault(text):
        raise UserError(f"{source.where(number)}, column {column!r}, {fault}")
    return text


def _label(cell: Any, source: Source, number: int, column: str) -> Label:
    names = source.class_names.get(column, ())
    try:
        return label_of(cell, names[0] if names else ())
    except ValueError as error:
        other = ""
        if isinstance(cell, float) and cell == cell:
            other = "; task_type: regression is for numbers"
        elif isinstance(cell, list):
            other = "; task_type: multi_label is for lists"
        raise UserError(
            f"{source.where(number)}, column {column!r}, holds {error}: a class is a whole number from 0, a word, or "
            f"true or false{other}"
        ) from None
