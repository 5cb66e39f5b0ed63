"""What a recipe says about its labelled data, and their rows: texts, classes from a column or a text, and ids."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from isotune.config.recipes import LabelSource, OverlongText
from isotune.data.contents import clean, contents_of, random_labels
from isotune.data.documents import DataSettings, Documents
from isotune.data.sources.source import Row, Source, kind_of_value, surrogate_fault
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError

Id = int | str

# A class as the cell of a CSV file; pandas writes 1.0 for 1 in a column where a value was missing.
WHOLE_NUMBER = re.compile(r"[0-9]{1,10}(\.0+)?")
ID_FIELD = "id"  # the column that is taken for ids where the recipe names none


# Classes that follow from a text itself: their names, and the function that gives a clean text one of them.
LabelRules = tuple[tuple[str, ...], Callable[[str], int]]
LABEL_RULES: list[LabelRules] = []  # those of `label_source: rules`, which a project appends when it is imported


def _rules() -> LabelRules:
    import_module("isotune.projects")
    return LABEL_RULES[0]


@dataclass(frozen=True)
class ClassificationSettings(DataSettings):
    """What a recipe says about its labelled data."""

    MIN_OWN_TOKENS: ClassVar[int] = 1

    max_seq_length: int = 512
    overlong: OverlongText = "head"  # which end is kept, or both
    dataset_text_field: str = "text"
    seed: int = 0  # of the random labels
    dataset_label_field: str = "label"
    dataset_id_field: str | None = None  # `id` where there is one
    clean_text: bool = False  # undo HTML and escapes (isotune.data.contents)
    label_source: LabelSource = "column"  # or the rules that a project has; or random, by the seed and the content
    num_labels: int | None = None  # as many as there are

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where the source of the labels gives any."""
        if self.label_source == "rules":
            return _rules()[0]
        return ("heads", "tails") if self.label_source == "random" else None

    def check(self, special_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        super().check(special_tokens)
        if self.label_names and self.num_labels not in (None, len(self.label_names)):
            raise UserError(
                f"num_labels is {self.num_labels}, and label_source: {self.label_source} has {len(self.label_names)} "
                f"classes ({', '.join(self.label_names)})"
            )


def labels_of(texts: Sequence[str], settings: ClassificationSettings) -> np.ndarray:
    """The classes that the rules, or chance, give to texts: int32 [texts]."""
    if settings.label_source == "random":
        return random_labels(settings.seed, contents_of(texts))
    assert settings.label_source == "rules", "the classes of other sources stand in a column"
    _, classify = _rules()
    return np.array([classify(clean(text)) for text in texts], np.int32)


def read_documents(
    source: Source, encoder: TextEncoder, settings: ClassificationSettings, *, show_progress: bool
) -> Documents:
    """All rows of a source, tokenized, with their classes; UserError names the row that lacks a text, class or id.

    The columns are `ids`, the data set's own or the numbers of the rows; `contents` (isotune.data.contents); the
    encoder's `whole_lengths`; and `marked`, bool: whether the text holds HTML breaks, entities or escapes.
    """
    columns: dict[str, str] = {}
    parts: list[Documents] = []
    ids: list[Id] = []
    with tqdm(desc="preparing", unit=" documents", disable=not show_progress) as bar:
        for rows in source.batches():
            columns = columns or _columns(rows[0][1], settings)
            for number, row in rows:
                for key, column in columns.items():
                    if column not in row:
                        raise source.lacks(number, row, column, key)
            texts = [_text(row, source, number, settings.dataset_text_field) for number, row in rows]
            if column := columns.get("dataset_label_field"):
                labels = np.array([_label(row, source, number, column) for number, row in rows], np.int32)
            else:
                labels = labels_of(texts, settings)
            if column := columns.get("dataset_id_field"):
                ids += [_id(row, source, number, column) for number, row in rows]
            cleaned = [clean(text) for text in texts]
            chosen = cleaned if settings.clean_text else texts
            part = encoder.encode(chosen, settings.max_seq_length, settings.overlong, labels)
            marked = np.array([text != raw for text, raw in zip(cleaned, texts, strict=True)])
            own = {"contents": contents_of(texts), **part.columns, "marked": marked}
            parts.append(replace(part, columns=own))
            bar.update(len(rows))
    documents = Documents.concat(parts)
    numbers = np.arange(len(documents))
    return replace(documents, source_rows=numbers, columns={"ids": _as_ids(ids, numbers, source), **documents.columns})


def _columns(first: Row, settings: ClassificationSettings) -> dict[str, str]:
    """The columns that every row must have, by the recipe's key for each."""
    columns = {"dataset_text_field": settings.dataset_text_field}
    if settings.label_source == "column":
        columns["dataset_label_field"] = settings.dataset_label_field
    if settings.dataset_id_field or ID_FIELD in first:
        columns["dataset_id_field"] = settings.dataset_id_field or ID_FIELD
    return columns


def _as_ids(ids: list[Id], numbers: np.ndarray, source: Source) -> np.ndarray:
    """Ids as an array, int64 or text [documents]; the numbers of the rows where the data set has none."""
    if not ids:
        return numbers
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
    if isinstance(label, str) and WHOLE_NUMBER.fullmatch(label):
        label = int(label.partition(".")[0])
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
