"""The whole way from a named data set of labelled texts to documents with a class, kept on disk as others are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from isotune.data.cache import Content, load_or_build
from isotune.data.classification.labels import LabelSettings, contents_of, labels_of
from isotune.data.classification.rows import Columns, Id, LabelledRows, as_ids, read_labelled, texts_of
from isotune.data.classification.table import LabelTable, count_labels
from isotune.data.classification.text_encoding import TextEncoder
from isotune.data.clean_text import clean
from isotune.data.documents import LabelledDocuments, Rows
from isotune.data.packing import each_alone
from isotune.data.sft.preparation import digest
from isotune.data.sources.source import Source, read_rows
from isotune.io.errors import UserError

LABELLED_FORMAT_VERSION = 2  # raised when the same input gives other documents


@dataclass(frozen=True)
class LabelledTexts(LabelledDocuments):
    """Labelled documents and what only their preparation looks at.

    Attributes:
        contents: uint64 [documents]; digest of the normalised text: equal where two texts say the same.
        whole_lengths: int64 [documents]; tokens before anything was cut.
        marked: bool [documents]; whether the text holds HTML breaks, entities or escapes.
    """

    contents: np.ndarray
    whole_lengths: np.ndarray
    marked: np.ndarray

    def subset(self, kept: np.ndarray) -> Self:
        """Some of the documents, in their order; `kept`: bool [documents]."""
        values = {field.name: getattr(self, field.name)[kept] for field in fields(self) if field.name not in FLAT}
        lengths = self.lengths
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[kept])])
        return type(self)(input_ids=self.input_ids[np.repeat(kept, lengths)], starts=starts, **values)


FLAT = ("input_ids", "starts")  # the arrays that do not have one entry a document


@dataclass(frozen=True)
class PreparedLabels:
    """Labelled documents, a row for each, the counts to print, and a digest of all that decided them.

    `texts()` reads the texts once more, as they stand in the source, in the order of the documents.
    """

    documents: LabelledDocuments
    rows: Rows
    table: LabelTable
    fingerprint: str
    texts: Callable[[], Iterator[str]]

    @property
    def num_labels(self) -> int:
        """Classes, from 0 to the largest."""
        return len(self.table.counts.classes)


@dataclass(frozen=True)
class LabelledSet:
    """One split of a data set, read and tokenised, before it is decided which of its documents are used."""

    texts: LabelledTexts
    source: Source
    settings: LabelSettings
    special_tokens: int
    fingerprint: str

    @property
    def num_labels(self) -> int:
        """Classes: as the recipe or the source of the labels says, else from 0 to the largest."""
        settings = self.settings
        return settings.num_labels or len(settings.label_names or ()) or int(self.texts.labels.max()) + 1

    def check_classes(self, *, evaluation: bool, left_by: str = "") -> None:
        """Raise UserError for classes that are not 0 to K - 1, each with rows; evaluation data may lack some.

        `left_by` is the recipe's key that took documents away.
        """
        left = f" that {left_by} left to train on" if left_by else ""
        _check_classes(self.texts, self.source, self.settings, evaluation=evaluation, left=left)

    def read_texts(self) -> Iterator[str]:
        """The texts once more, as they stand in the source, in the order of the documents."""
        return texts_of(self.source, self.settings.dataset_text_field, self.texts.source_rows)

    def subset(self, kept: np.ndarray, *why: Any) -> Self:
        """Some of the documents; `kept`: bool [documents], `why`: what decided it, for the fingerprint."""
        return replace(self, texts=self.texts.subset(kept), fingerprint=digest(self.fingerprint, *why))

    def prepared(self, num_labels: int | None = None, **remarks: Any) -> PreparedLabels:
        """Rows and the table; `remarks` are further fields of `isotune.data.classification.table.LabelCounts`."""
        settings, texts = self.settings, self.texts
        counts = count_labels(
            texts,
            source=self.source.name,
            overlong=settings.overlong,
            max_seq_length=settings.max_seq_length,
            special_tokens=self.special_tokens,
            cleaned=settings.clean_text,
            num_labels=num_labels or settings.num_labels,
            label_names=settings.label_names,
            **remarks,
        )
        return PreparedLabels(
            documents=texts,
            rows=each_alone(len(texts)),
            table=LabelTable(counts, settings.max_seq_length),
            fingerprint=self.fingerprint,
            texts=self.read_texts,
        )


def prepare_labelled(
    dataset_name: str,
    split: str,
    tokenizer: Any,
    settings: LabelSettings,
    *,
    name: str = "dataset_name",
    evaluation: bool = False,
    show_progress: bool = True,
) -> PreparedLabels:
    """Read and tokenise one split of a data set of labelled texts, and use all of it.

    An empty text is kept, as the special tokens alone, and counted: to drop it would make a prediction missing.

    Args:
        dataset_name, split, name: as in `isotune.data.sources.source.read_rows`.
        tokenizer: of transformers, with a Rust backend, that puts a token before a text.
        evaluation: classes may be absent, because `settings.num_labels` came from the training data.
        show_progress: a bar of documents on stderr; one process of a launch should say True.

    Raises:
        UserError: whatever the user can put right, in one sentence.
    """
    found = read_labelled_set(dataset_name, split, tokenizer, settings, name=name, show_progress=show_progress)
    found.check_classes(evaluation=evaluation)
    return found.prepared()


def read_labelled_set(
    dataset_name: str, split: str, tokenizer: Any, settings: LabelSettings, *, name: str, show_progress: bool
) -> LabelledSet:
    """Read and tokenise one split: the first half of `prepare_labelled`, which says the rest."""
    settings.check(TextEncoder(tokenizer).special_tokens)
    return tokenise(read_rows(dataset_name, split, name=name), tokenizer, settings, show_progress=show_progress)


def tokenise(source: Source, tokenizer: Any, settings: LabelSettings, *, show_progress: bool) -> LabelledSet:
    """Read and tokenise any source of rows."""
    encoder = TextEncoder(tokenizer)
    settings.check(encoder.special_tokens)
    labels_from = {
        "column": settings.dataset_label_field,
        "rules": "",
        "random": settings.seed,
    }[settings.label_source]
    fingerprint = digest(
        "labelled",
        LABELLED_FORMAT_VERSION,
        source.fingerprint,
        encoder.fingerprint,
        settings.max_seq_length,
        settings.overlong,
        settings.dataset_text_field,
        settings.dataset_id_field,
        settings.clean_text,
        settings.label_source,
        labels_from,
    )
    texts, _ = load_or_build(
        fingerprint, lambda: _build(source, encoder, settings, show_progress=show_progress), LabelledTexts
    )
    return LabelledSet(texts, source, settings, encoder.special_tokens, fingerprint)


def _build(
    source: Source, encoder: TextEncoder, settings: LabelSettings, *, show_progress: bool
) -> Content[LabelledTexts]:
    columns = Columns(
        text=settings.dataset_text_field,
        label=settings.dataset_label_field if settings.label_source == "column" else None,
        id=settings.dataset_id_field,
    )
    parts: dict[str, list[np.ndarray]] = {}
    ids: list[Id] = []
    with tqdm(desc="preparing", unit=" documents", disable=not show_progress) as bar:
        for rows in read_labelled(source, columns):
            for name, values in _prepare_rows(rows, encoder, settings).items():
                parts.setdefault(name, []).append(values)
            ids += rows.ids or []
            bar.update(len(rows.texts))
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    lengths = arrays.pop("lengths")
    documents = LabelledTexts(
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        source_rows=np.arange(len(lengths)),
        ids=as_ids(ids, len(lengths), source),
        **arrays,
    )
    return documents, {}


def _prepare_rows(rows: LabelledRows, encoder: TextEncoder, settings: LabelSettings) -> dict[str, np.ndarray]:
    cleaned = [clean(text) for text in rows.texts]
    encoded = encoder.encode(cleaned if settings.clean_text else rows.texts, settings.max_seq_length, settings.overlong)
    contents = contents_of(rows.texts)
    labels = np.array(rows.labels, np.int32) if rows.labels else labels_of(rows.texts, settings)
    return {
        "input_ids": encoded.input_ids,
        "lengths": encoded.lengths,
        "whole_lengths": encoded.whole_lengths,
        "labels": labels,
        "contents": contents,
        "marked": np.array([text != raw for text, raw in zip(cleaned, rows.texts, strict=True)]),
    }


def _check_classes(
    texts: LabelledTexts, source: Source, settings: LabelSettings, *, evaluation: bool, left: str
) -> None:
    num_labels = settings.num_labels
    if not len(texts):
        raise UserError(f"no document of {source.name} is left to {'evaluate on' if evaluation else 'train on'}")
    largest = int(texts.labels.max())
    if num_labels is not None and largest >= num_labels:
        document = int(np.argmax(texts.labels >= num_labels))
        raise UserError(
            f"{source.where(int(texts.source_rows[document]))} is of class {int(texts.labels[document])}, and "
            f"num_labels is {num_labels}: 0 to {num_labels - 1}"
        )
    if evaluation:
        return
    present = np.unique(texts.labels)
    if len(present) == 1:
        raise UserError(f"every row of {source.name}{left} is of class {largest}: there is nothing to tell apart")
    count = num_labels or largest + 1
    if len(present) < count and settings.label_names is None:
        absent = int(np.setdiff1d(np.arange(min(count, len(present) + 1)), present)[0])
        said = f"num_labels is {num_labels}" if num_labels else f"the largest class is {largest}"
        raise UserError(
            f"{source.name} has no row of class {absent}{left}, and {said}: classes are 0 to K - 1, each with rows"
        )
