"""What a recipe says about its labelled data, and their rows: texts, classes from a column or a text, and ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, cast

import numpy as np
from tqdm import tqdm

from isotune.config.recipes import AUTO, NO_IDS, LabelSource, OverlongText
from isotune.data.classification.classes import ClassColumn, Label, label_of, resolve
from isotune.data.contents import clean, contents_of, random_labels
from isotune.data.documents import DataSettings, Documents
from isotune.data.sources.source import Row, Source, kind_of_value, surrogate_fault
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError, shown

Id = int | str

# A class as the cell of a CSV file; pandas writes 1.0 for 1 in a column where a value was missing.

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
    dataset_id_field: str = AUTO  # `id` where it names each row once; NO_IDS: row numbers
    clean_text: bool = False  # undo HTML and escapes (isotune.data.contents)
    label_source: LabelSource = "column"  # or the rules that a project has; or random, by the seed and the content
    num_labels: int | None = None  # as many as there are
    label_names: tuple[str, ...] | None = None  # of the classes in their order; else those of the data

    @property
    def known_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where they are known before the data are read."""
        if self.label_source == "rules":
            return _rules()[0]
        return ("heads", "tails") if self.label_source == "random" else self.label_names

    def check(self, special_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        super().check(special_tokens)
        if self.known_names and self.num_labels not in (None, len(self.known_names)):
            says = "label_names" if self.label_source == "column" else f"label_source: {self.label_source}"
            raise UserError(
                f"num_labels is {self.num_labels}, and {says} has {len(self.known_names)} classes "
                f"({', '.join(self.known_names)})"
            )


def labels_of(texts: Sequence[str], settings: ClassificationSettings) -> np.ndarray:
    """The classes that the rules, or chance, give to texts: int32 [texts]."""
    if settings.label_source == "random":
        return random_labels(settings.seed, contents_of(texts))
    assert settings.label_source == "rules", "the classes of other sources stand in a column"
    _, classify = _rules()
    return np.array([classify(clean(text)) for text in texts], np.int32)


@dataclass(frozen=True)
class LabelledDocuments:
    """The rows of a source as documents, and what was found about their classes and ids."""

    documents: Documents
    class_names: tuple[str, ...] | None = None
    numbered: bool = True  # whether the classes' numbers are the data's own: those of words are not
    notes: tuple[str, ...] = ()  # lines for the user


def read_documents(
    source: Source, encoder: TextEncoder, settings: ClassificationSettings, *, show_progress: bool
) -> LabelledDocuments:
    """All rows of a source, tokenized, with their classes; UserError names the row that lacks a text, class or id.

    The columns are `ids`, the data set's own or the numbers of the rows; `contents` (isotune.data.contents); the
    encoder's `whole_lengths`; and `marked`, bool: whether the text holds HTML breaks, entities or escapes.
    """
    columns: dict[str, str] = {}
    parts: list[Documents] = []
    ids: list[Any] = []
    labels: list[Label] = []
    with tqdm(desc="preparing", unit=" documents", disable=not show_progress) as bar:
        for rows in source.batches():
            columns = columns or _columns(rows[0][1], settings)
            for number, row in rows:
                for key, column in columns.items():
                    if column not in row:
                        raise source.lacks(number, row, column, key)
            texts = [_text(row, source, number, settings.dataset_text_field) for number, row in rows]
            of_rules = None
            if column := columns.get("dataset_label_field"):
                labels += [_label(row, source, number, column) for number, row in rows]
            else:
                of_rules = labels_of(texts, settings)
            if settings.dataset_id_field == AUTO:
                ids += [row[ID_FIELD] for _, row in rows if ID_FIELD in row]
            elif column := columns.get("dataset_id_field"):
                ids += [_id(row, source, number, column) for number, row in rows]
            cleaned = [clean(text) for text in texts]
            chosen = cleaned if settings.clean_text else texts
            part = encoder.encode(chosen, settings.max_seq_length, settings.overlong, of_rules)
            marked = np.array([text != raw for text, raw in zip(cleaned, texts, strict=True)])
            own = {"contents": contents_of(texts), **part.columns, "marked": marked}
            parts.append(replace(part, columns=own))
            bar.update(len(rows))
    documents = Documents.concat(parts)
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


def _columns(first: Row, settings: ClassificationSettings) -> dict[str, str]:
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
        return label_of(row[column], names[0] if names else ())
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
