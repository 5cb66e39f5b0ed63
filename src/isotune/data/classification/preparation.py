"""From a named data set of labelled texts to documents with a class each, kept on disk as conversations are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from isotune.config.recipes import AUTO
from isotune.data.cache import Content, load_or_build
from isotune.data.classification.classes import listed
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.reading import read_documents
from isotune.data.contents import EMPTY
from isotune.data.documents import CountsTable, Documents, PreparedData, count_lines, digest, note_lines, with_share
from isotune.data.mixture import count_parts, mixture_lines, name_parts
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
    mixture: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the counts of a mixture by its parts

    @property
    def num_labels(self) -> int:
        """Classes: as the recipe or the source of the labels says, else from 0 to the largest."""
        return self.settings.num_labels or len(self.class_names or ()) or int(self.documents.labels.max()) + 1

    @property
    def contents(self) -> np.ndarray:
        """What each text says: uint64 [documents]."""
        return np.asarray(self.documents.columns["contents"])

    def texts(self) -> Iterator[str]:
        """The texts once more, as they stand in the source, in the order of the documents."""
        chosen, column = set(self.documents.source_rows.tolist()), self.settings.dataset_text_field
        return (row[column] for number, row in enumerate(self.source.rows()) if number in chosen)

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
    settings.check(encoder.special_tokens)
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

    def build(folder: Path) -> Content:
        found = read_documents(source, encoder, settings, folder, show_progress=show_progress)
        facts = {"class_names": found.class_names, "numbered": found.numbered, "notes": [*source.notes, *found.notes]}
        return found.documents.as_arrays(), facts | count_parts(source, found.documents)

    # not under the fingerprint itself: entries of earlier versions have no facts
    arrays, facts = load_or_build(digest(fingerprint, "with facts"), build)
    names = facts["class_names"]
    return LabelledSplit(
        Documents.from_arrays(arrays),
        source,
        settings,
        encoder.special_tokens,
        fingerprint,
        None if names is None else tuple(names),
        facts["numbered"],
        tuple(facts["notes"]),
        name_parts(source, facts),
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
    classes: list[int] = np.bincount(documents.labels, minlength=num_labels).tolist()
    counts: dict[str, Any] = {
        "documents": len(documents),  # that are used, each a row of the source
        "cut": int((whole_lengths > max_seq_length).sum()),
        "overlong": overlong,  # what is left of the cut ones
        "empty": int((whole_lengths == special_tokens).sum()),
        "tokens": len(documents.input_ids),  # special tokens included
        "classes": classes,  # documents of each
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
    names = [f", {name}" for name in class_names] if class_names else [""] * len(classes)
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
        *(
            (f"  of class {label}{name}", with_share(number, len(documents)))
            for label, (number, name) in enumerate(zip(classes, names, strict=True))
        ),
        *mixture_lines(counts),
        *note_lines(counts["notes"]),
        ("tokens", f"{counts['tokens']:,}"),
    ]
    return CountsTable(source, counts, tuple(lines))


def _contradicting(contents: np.ndarray, labels: np.ndarray) -> int:
    """Documents whose text another one has under another class; `contents`, `labels`: [documents]."""
    _, which = np.unique(contents, return_inverse=True)
    pairs = np.unique(np.stack([which, labels]), axis=1)
    classes_of_text = np.bincount(pairs[0], minlength=1)
    return int((classes_of_text[which] > 1).sum())
