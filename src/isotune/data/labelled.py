"""The whole way from a named data set of labelled texts to documents with a class, kept on disk as others are."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from isotune.data.batches import BATCH_ROWS
from isotune.data.cache import Content, load_or_build
from isotune.data.documents import LabelledDocuments, Rows
from isotune.data.labelled_table import LabelCounts, LabelTable
from isotune.data.packing import each_alone
from isotune.data.preparation import digest
from isotune.data.sources import Row, Source, read_rows
from isotune.data.table import length_quantiles
from isotune.data.text_encoding import OverlongText, TextEncoder
from isotune.errors import UserError

LABELLED_FORMAT_VERSION = 1  # raised when the same input gives other documents


@dataclass(frozen=True)
class LabelSettings:
    """What a recipe says about its labelled data.

    Attributes:
        max_seq_length: tokens of a document at most, special tokens included.
        overlong: which end of a longer text is kept, or both.
        dataset_text_field, dataset_label_field: the columns.
        num_labels: classes; None takes as many as there are.
    """

    max_seq_length: int = 512
    overlong: OverlongText = "head"
    dataset_text_field: str = "text"
    dataset_label_field: str = "label"
    num_labels: int | None = None

    def check(self, special_tokens: int) -> None:
        """Raise UserError for a value that no data could be prepared with."""
        if self.max_seq_length < special_tokens + 1:
            raise UserError(
                f"max_seq_length is {self.max_seq_length}: a document needs at least {special_tokens + 1} tokens"
            )
        if self.overlong not in get_args(OverlongText):
            raise UserError(f"overlong is {self.overlong!r}; it may be {', '.join(get_args(OverlongText))}")


@dataclass(frozen=True)
class PreparedLabels:
    """Labelled documents, a row for each, the counts to print, and a digest of all that decided them."""

    documents: LabelledDocuments
    rows: Rows
    table: LabelTable
    fingerprint: str

    @property
    def num_labels(self) -> int:
        """Classes, from 0 to the largest."""
        return len(self.table.counts.classes)


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
    """Read and tokenise one split of a data set of labelled texts.

    An empty text is kept, as the special tokens alone, and counted: to drop it would make a prediction missing.

    Args:
        dataset_name, split, name: as in `isotune.data.sources.read_rows`.
        tokenizer: of transformers, with a Rust backend, that puts a token before a text.
        evaluation: classes may be absent, because `settings.num_labels` came from the training data.
        show_progress: a bar of documents on stderr; one process of a launch should say True.

    Raises:
        UserError: whatever the user can put right, in one sentence; nothing is written then.
    """
    encoder = TextEncoder(tokenizer)
    settings.check(encoder.special_tokens)
    source = read_rows(dataset_name, split, name=name)
    fingerprint = digest(
        "labelled",
        LABELLED_FORMAT_VERSION,
        source.fingerprint,
        encoder.fingerprint,
        settings.max_seq_length,
        settings.overlong,
        settings.dataset_text_field,
        settings.dataset_label_field,
    )
    documents, counts = load_or_build(
        fingerprint, lambda: _build(source, encoder, settings, show_progress=show_progress), LabelledDocuments
    )
    _check_classes(documents, source, settings.num_labels, evaluation=evaluation)
    classes = np.bincount(documents.labels, minlength=settings.num_labels or 0).tolist()
    table = LabelTable(LabelCounts(**{**counts, "source": source.name, "classes": classes}), settings.max_seq_length)
    return PreparedLabels(documents, each_alone(len(documents)), table, fingerprint)


def _build(
    source: Source, encoder: TextEncoder, settings: LabelSettings, *, show_progress: bool
) -> Content[LabelledDocuments]:
    parts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    whole_lengths: list[np.ndarray] = []
    labels: list[int] = []
    tally: Counter[str] = Counter()
    with tqdm(desc="preparing", unit=" documents", disable=not show_progress) as bar:
        for texts, classes in _read(source, settings):
            encoded = encoder.encode(texts, settings.max_seq_length, settings.overlong)
            parts.append(encoded.input_ids)
            lengths.append(encoded.lengths)
            whole_lengths.append(encoded.whole_lengths)
            labels.extend(classes)
            tally["empty"] += encoded.empty
            tally["cut"] += int((encoded.whole_lengths > settings.max_seq_length).sum())
            bar.update(len(texts))
    documents = LabelledDocuments(
        input_ids=np.concatenate(parts),
        labels=np.array(labels, np.int32),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))]),
        source_rows=np.arange(len(labels)),
    )
    counts = LabelCounts(
        source=source.name,
        documents=len(documents),
        cut=tally["cut"],
        overlong=settings.overlong,
        empty=tally["empty"],
        tokens=len(documents.input_ids),
        classes=[],
        whole_lengths=length_quantiles(np.concatenate(whole_lengths)),
    )
    return documents, asdict(counts)


def _read(source: Source, settings: LabelSettings) -> Iterator[tuple[list[str], list[int]]]:
    """The texts and classes of a source, some at a time; the sentence of a UserError names the row."""
    rows = enumerate(source.rows())
    columns = {
        "dataset_text_field": settings.dataset_text_field,
        "dataset_label_field": settings.dataset_label_field,
    }
    while some := list(islice(rows, BATCH_ROWS)):
        texts, labels = [], []
        for number, row in some:
            for key, column in columns.items():
                if column not in row:
                    held = ", ".join(row) or "none"
                    raise UserError(
                        f"{source.where(number)} lacks the column {column!r}; it has {held}: name it by {key}"
                    )
            texts.append(_text(row, source, number, settings.dataset_text_field))
            labels.append(_label(row, source, number, settings.dataset_label_field))
        yield texts, labels


def _text(row: Row, source: Source, number: int, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise UserError(f"{source.where(number)}, column {column!r}, holds {kind}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{source.where(number)}, column {column!r}, holds half of a surrogate pair at character {error.start}, "
            "which is no text"
        ) from error
    return text


def _label(row: Row, source: Source, number: int, column: str) -> int:
    label = row[column]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 2**31:
        said = "null" if label is None else repr(label)[:40]
        raise UserError(f"{source.where(number)}, column {column!r}, holds {said}: a class is a whole number from 0")
    return label


def _check_classes(documents: LabelledDocuments, source: Source, num_labels: int | None, *, evaluation: bool) -> None:
    largest = int(documents.labels.max())
    if num_labels is not None and largest >= num_labels:
        row = int(documents.source_rows[np.argmax(documents.labels >= num_labels)])
        label = int(documents.labels[row])
        raise UserError(
            f"{source.where(row)} is of class {label}, and num_labels is {num_labels}: 0 to {num_labels - 1}"
        )
    if evaluation:
        return
    present = np.unique(documents.labels)
    if len(present) == 1:
        raise UserError(f"every row of {source.name} is of class {largest}: there is nothing to tell apart")
    count = num_labels or largest + 1
    if len(present) < count:
        absent = int(np.setdiff1d(np.arange(min(count, len(present) + 1)), present)[0])
        said = f"num_labels is {num_labels}" if num_labels else f"the largest class is {largest}"
        raise UserError(
            f"{source.name} has no row of class {absent}, and {said}: classes are 0 to K - 1, each with rows"
        )
