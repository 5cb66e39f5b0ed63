"""From a named data set of labelled texts to documents with a class each, kept on disk as conversations are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from isotune.config.recipes import AUTO
from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.data.cache import Content, load_or_build
from isotune.data.class_index import listed
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.pairs import text_of
from isotune.data.classification.reading import read_documents
from isotune.data.contents import EMPTY
from isotune.data.documents import CountsTable, Documents, PreparedData, count_lines, digest, note_lines, with_share
from isotune.data.mixture import Mixture, count_parts, mixture_lines, name_parts
from isotune.data.packing import one_document_per_row
from isotune.data.sources.source import Source
from isotune.data.tokenizer import TextEncoder
from isotune.io.errors import UserError

LABELLED_FORMAT_VERSION = 2  # raised when the same input gives other documents
RULES_VERSION = 3  # raised when the rules of a project give a text another class


@dataclass(frozen=True)
class LabelledSplit:
    """One split of a data set, read and tokenized, before it is decided which of its documents are used."""

    documents: Documents
    source: Source
    settings: ClassificationSettings
    special_tokens: int
    fingerprint: str
    class_names: tuple[str, ...] | None = None  # as the recipe, the data or the source of the labels says
    numbered: bool = True  # whether the numbers of the classes are the data's own: those of words are not
    notes: tuple[str, ...] = ()  # what reading guessed, or passed over
    task_type: str = SINGLE_LABEL
    mixture: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the counts of a mixture by its parts
    by_place: bool = False  # whether a label was taken for the place of a known class, which no name confirms

    @property
    def num_labels(self) -> int:
        """Classes: as the recipe or the source of the labels says, else from 0 to the largest; outputs of the model."""
        if self.task_type == REGRESSION:
            return 1
        if self.task_type == MULTI_LABEL:
            return self.documents.labels.shape[1]
        return self.settings.num_labels or len(self.class_names or ()) or int(self.documents.labels.max()) + 1

    @property
    def contents(self) -> np.ndarray:
        """What each text says: uint64 [documents]."""
        return np.asarray(self.documents.columns["contents"])

    def texts(self) -> Iterator[str]:
        """The texts once more, as they stand in the source, in the order of the documents."""
        chosen = set(self.documents.source_rows.tolist())
        columns = self.settings.dataset_text_field, self.settings.dataset_text_pair_field
        return (text_of(row, *columns) for number, row in enumerate(self.source.rows()) if number in chosen)

    def select(self, kept: np.ndarray, *why: Any) -> Self:
        """Some of the documents; `kept`: bool [documents], `why`: what decided it, for the fingerprint."""
        return replace(self, documents=self.documents.select(kept), fingerprint=digest(self.fingerprint, *why))

    def check_classes(self, *, evaluation: bool, left_by: str = "") -> None:
        """Raise UserError for classes that are not 0 to K - 1, each with rows; evaluation data may lack some.

        `left_by` is the recipe's key that took documents away.
        """
        name, documents, num_labels = self.source.name, self.documents, self.settings.num_labels
        names = self.class_names
        if names and num_labels not in (None, len(names)):
            raise UserError(f"num_labels is {num_labels}, and {name} has {len(names)} classes: {listed(names)}")
        if not len(documents):
            raise UserError(f"no document of {name} is left to {'evaluate on' if evaluation else 'train on'}")
        if self.task_type != SINGLE_LABEL:
            if not evaluation:
                self._check_difference(f" that {left_by} left to train on" if left_by else "")
            return
        largest = int(documents.labels.max())
        if num_labels is not None and largest >= num_labels:
            document = int(np.argmax(documents.labels >= num_labels))
            raise UserError(
                f"{self.source.where(int(documents.source_rows[document]))} is of class "
                f"{int(documents.labels[document])}, and num_labels is {num_labels}: 0 to {num_labels - 1}"
            )
        if evaluation:
            return
        left = f" that {left_by} left to train on" if left_by else ""
        present = np.unique(documents.labels)
        if len(present) == 1:
            only = names[largest] if names else largest
            raise UserError(f"every row of {name}{left} is of class {only}: there is nothing to tell apart")
        count = num_labels or largest + 1
        if len(present) < count and names is None:
            absent = int(np.setdiff1d(np.arange(min(count, len(present) + 1)), present)[0])
            expected = f"num_labels is {num_labels}" if num_labels else f"the largest class is {largest}"
            raise UserError(
                f"{name} has no row of class {absent}{left}, and {expected}: classes are 0 to K - 1, each with rows; "
                "label_names says what they are called where they are other numbers"
            )

    def _check_difference(self, left: str) -> None:
        """Raise UserError where all rows have the same number or labels."""
        labels = self.documents.labels
        if len(np.unique(labels, axis=0)) > 1:
            return
        if self.task_type == REGRESSION:
            what = f"has the number {labels[0]:g}"
        else:
            names = self.class_names or tuple(map(str, range(labels.shape[1])))
            own = [name for name, is_there in zip(names, labels[0], strict=True) if is_there]
            what = f"has the labels {listed(own)}" if own else "has no label"
        raise UserError(f"every row of {self.source.name}{left} {what}: there is nothing to learn")

    def prepared(self, num_labels: int | None = None, **remarks: Any) -> PreparedData:
        """Rows and the table; `remarks` are those of `labels_table`."""
        settings = self.settings
        table = labels_table(
            self.source.name,
            self.documents,
            max_seq_length=settings.max_seq_length,
            overlong=settings.overlong,
            num_labels=len(self.class_names or ()) or num_labels or settings.num_labels or 0,
            class_names=self.class_names,
            special_tokens=self.special_tokens,
            cleaned=settings.clean_text,
            task_type=self.task_type,
            notes=list(self.notes),
            **self.mixture,
            **remarks,
        )
        rows = one_document_per_row(len(self.documents))
        return PreparedData(self.documents, rows, table, self.fingerprint, self.texts)


def tokenize(source: Source, tokenizer: Any, settings: ClassificationSettings, *, show_progress: bool) -> LabelledSplit:
    """Read and tokenize a source of labelled texts, before it is decided which of them are used.

    An empty text is kept, as the special tokens alone, and counted: to drop it would make a prediction missing.
    """
    encoder = TextEncoder(tokenizer)
    is_pair = settings.dataset_text_pair_field is not None
    special_tokens = encoder.pair_form().special_tokens if is_pair else encoder.special_tokens
    settings.check(special_tokens)
    ids = None if settings.dataset_id_field == AUTO else settings.dataset_id_field
    texts = (settings.max_seq_length, settings.overlong, settings.dataset_text_field, ids)
    labels_from = {"column": settings.dataset_label_field, "rules": RULES_VERSION, "random": settings.seed}[
        settings.label_source
    ]
    labels = (settings.clean_text, settings.label_source, labels_from)
    named: list[Any] = [
        own for own in (settings.label_names, source.class_names.get(settings.dataset_label_field)) if own
    ]
    fingerprint = digest(
        "labelled", LABELLED_FORMAT_VERSION, source.fingerprint, encoder.fingerprint, *texts, *labels, *named
    )
    if is_pair:
        fingerprint = digest(fingerprint, settings.dataset_text_pair_field, encoder.pair_form().facts())

    def build(folder: Path) -> Content:
        found = read_documents(source, encoder, settings, folder, show_progress=show_progress)
        facts = {"class_names": found.targets.names, "numbered": found.targets.numbered}
        facts |= {"notes": [*source.notes, *found.notes], "task_type": found.targets.task_type}
        facts |= {"by_place": found.targets.by_place}
        return found.documents.as_arrays(), facts | count_parts(source, found.documents)

    # not under the fingerprint itself: entries of earlier versions have no facts, or fewer, or other classes of codes
    # and truths, or, of mixtures, of numbers that are texts
    of_mixture = ["numbers in texts"] if isinstance(source, Mixture) else []
    arrays, facts = load_or_build(
        digest(fingerprint, "with named codes, truth and places", settings.task_type, settings.num_labels, *of_mixture),
        build,
    )
    names, task_type = facts["class_names"], facts["task_type"]
    if task_type != SINGLE_LABEL:
        fingerprint = digest(fingerprint, task_type, *arrays["labels"].shape[1:])
    return LabelledSplit(
        Documents.from_arrays(arrays),
        source,
        settings,
        special_tokens,
        fingerprint,
        None if names is None else tuple(names),
        facts["numbered"],
        tuple(facts["notes"]),
        task_type,
        name_parts(source, facts),
        facts["by_place"],
    )


def labels_table(
    source: str,
    documents: Documents,
    *,
    max_seq_length: int,
    overlong: str,
    num_labels: int = 0,
    class_names: Sequence[str] | None = None,
    special_tokens: int = 0,
    cleaned: bool = False,
    task_type: str = SINGLE_LABEL,
    **remarks: Any,
) -> CountsTable:
    """What became of labelled texts, as the table that preparation prints, with `num_labels` classes at least.

    The documents have the column `whole_lengths`, and `contents` and `marked` where those are known; `special_tokens`
    is the length of an empty text. `remarks` are the counts that only the caller knows.
    """
    whole_lengths = documents.columns["whole_lengths"]
    contents = documents.columns.get("contents", np.zeros(0, np.uint64))
    told = contents != EMPTY
    contents, labels = contents[told], documents.labels[: len(told)][told]
    classes, of_labels = _label_counts(documents.labels, task_type, num_labels, class_names)
    counts: dict[str, Any] = {
        "documents": len(documents),  # that are used, each a row of the source
        "cut": int((whole_lengths > max_seq_length).sum()),
        "overlong": overlong,  # what is left of the cut ones
        "empty": int((whole_lengths == special_tokens).sum()),
        "tokens": len(documents.input_ids),  # special tokens included
        "task_type": task_type,
        "classes": classes,  # documents of each class or label; None of a regression
        "whole_lengths": CountsTable.quantiles(whole_lengths),  # tokens of a text before anything was cut
        "class_names": list(class_names) if class_names else None,
        "repeated": len(contents) - len(np.unique(contents)),
        "contradicting": _contradicting(contents, labels),
        "marked": int(documents.columns["marked"].sum()) if "marked" in documents.columns else 0,
        "cleaned": cleaned,  # whether marks were undone
        "held_out": 0,  # rows that `eval_split_share` gave to the other side of the split
        "in_the_other": {},  # documents by how they stand in the other of training and evaluation data too
        "notes": [],
        "dropped": 0,  # documents left out of training because of that (`drop_leaked`)
        **remarks,
        "max_seq_length": max_seq_length,
    }
    undone = "undone" if cleaned else "left (clean_text: true undoes them)"
    lines = [
        ("documents", f"{len(documents):,}"),
        *count_lines({"  not among them: on the other side of the split": counts["held_out"]}),
        *count_lines({"  not among them: dropped, in the evaluation data too": counts["dropped"]}),
        *count_lines(
            {
                **{f"  {how} in the other data too": number for how, number in counts["in_the_other"].items()},
                f"  cut to {max_seq_length:,} tokens ({overlong})": counts["cut"],
                "  of an empty text, kept": counts["empty"],
                "  with the text of an earlier one": counts["repeated"],
                "  with the text of one of another class": counts["contradicting"],
                f"  with HTML or escapes, {undone}": counts["marked"],
            },
            share_of=len(documents),
        ),
        *of_labels,
        *mixture_lines(counts),
        *note_lines(counts["notes"]),
        ("tokens", f"{counts['tokens']:,}"),
    ]
    return CountsTable(source, counts, tuple(lines))


def _label_counts(
    labels: np.ndarray, task_type: str, num_labels: int, names: Sequence[str] | None
) -> tuple[list[int] | None, list[tuple[str, str]]]:
    """Documents of each class or label, and the lines of the table for what documents are labelled with."""
    if task_type == REGRESSION:
        spread = f"{labels.min():g} to {labels.max():g}, mean {labels.mean():.4g}, deviation {labels.std():.4g}"
        return None, [("  labelled with numbers", spread)]
    several = task_type == MULTI_LABEL
    counts = labels.sum(axis=0, dtype=np.int64) if several else np.bincount(labels, minlength=num_labels)
    called = [f", {name}" for name in names] if names else [""] * len(counts)
    kind = "with label" if several else "of class"
    lines = [
        (f"  {kind} {label}{name}", with_share(int(number), len(labels)))
        for label, (number, name) in enumerate(zip(counts, called, strict=True))
    ]
    without = int((labels.sum(axis=1) == 0).sum()) if several else 0
    return counts.tolist(), [*lines, *count_lines({"  without a label": without}, share_of=len(labels))]


def _contradicting(contents: np.ndarray, labels: np.ndarray) -> int:
    """Documents whose text another one has under other labels; `contents` [documents], `labels` [documents, ...]."""
    if not len(contents):
        return 0
    _, which = np.unique(contents, return_inverse=True)
    if labels.dtype.kind != "i":
        _, labels = np.unique(labels, axis=0, return_inverse=True)
        labels = labels.reshape(-1)
    pairs = np.unique(np.stack([which, labels]), axis=1)
    classes_of_text = np.bincount(pairs[0], minlength=1)
    return int((classes_of_text[which] > 1).sum())
