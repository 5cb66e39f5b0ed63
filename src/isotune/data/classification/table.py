"""What preparation did to labelled texts, counted: as a table to read and as numbers to keep."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from isotune.data.clean_text import EMPTY
from isotune.data.sft.table import length_quantiles


@dataclass(frozen=True)
class LabelCounts:
    """What became of the rows of a source; each that is used is one document.

    Attributes:
        source: where the rows came from.
        documents: those that are used.
        held_out: rows that `eval_split_share` gave to the other side of the split.
        in_the_other: documents that stand, exactly or nearly, in the other of training and evaluation data too.
        dropped: documents left out of training because of that (`drop_leaked`).
        cut: texts that were longer than max_seq_length, and by `overlong` what is left of them.
        empty: texts without a token of their own, kept as the special tokens alone.
        repeated: documents whose text an earlier one has; empty texts do not count.
        contradicting: documents whose text another one has under another class.
        marked: texts with HTML breaks, entities or escapes; `cleaned` says whether they were undone.
        tokens: of the documents, special tokens included.
        classes: documents of each class.
        whole_lengths: quantiles of the tokens of a text before anything was cut.
    """

    source: str
    documents: int
    cut: int
    overlong: str
    empty: int
    tokens: int
    classes: list[int]
    whole_lengths: dict[str, int] = field(default_factory=dict)
    class_names: list[str] | None = None
    repeated: int = 0
    contradicting: int = 0
    marked: int = 0
    cleaned: bool = False
    held_out: int = 0
    in_the_other: dict[str, int] = field(default_factory=dict)
    dropped: int = 0


def count_labels(
    texts: Any,
    *,
    source: str,
    overlong: str,
    max_seq_length: int,
    special_tokens: int,
    cleaned: bool,
    num_labels: int | None,
    label_names: tuple[str, ...] | None,
    **remarks: Any,
) -> LabelCounts:
    """Count `LabelledTexts`; `remarks` are the fields that only the caller knows."""
    return LabelCounts(
        source=source,
        documents=len(texts),
        cut=int((texts.whole_lengths > max_seq_length).sum()),
        overlong=overlong,
        empty=int((texts.whole_lengths == special_tokens).sum()),
        tokens=len(texts.input_ids),
        classes=np.bincount(texts.labels, minlength=len(label_names or ()) or num_labels or 0).tolist(),
        whole_lengths=length_quantiles(texts.whole_lengths),
        class_names=list(label_names) if label_names else None,
        repeated=repeated(texts.contents),
        contradicting=contradicting(texts.contents, texts.labels),
        marked=int(texts.marked.sum()),
        cleaned=cleaned,
        **remarks,
    )


def repeated(contents: np.ndarray) -> int:
    """Documents whose text an earlier one has; `contents`: uint64 [documents]."""
    contents = contents[contents != np.uint64(EMPTY)]
    return len(contents) - len(np.unique(contents))


def contradicting(contents: np.ndarray, labels: np.ndarray) -> int:
    """Documents whose text another one has under another class; `contents`, `labels`: [documents]."""
    told = contents != np.uint64(EMPTY)
    contents, labels = contents[told], labels[told]
    _, which = np.unique(contents, return_inverse=True)
    pairs = np.unique(np.stack([which, labels]), axis=1)
    classes_of_text = np.bincount(pairs[0], minlength=1)
    return int((classes_of_text[which] > 1).sum())


@dataclass(frozen=True)
class LabelTable:
    """The counts and the longest length allowed; `str()` is the table to print."""

    counts: LabelCounts
    max_seq_length: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        return {**asdict(self.counts), "max_seq_length": self.max_seq_length}

    def __str__(self) -> str:
        counts = self.counts
        names = counts.class_names or [""] * len(counts.classes)
        share = max(counts.documents, 1)
        lines = [("documents", f"{counts.documents:,}")]
        lines += [(f"  {name}", f"{number:,}") for name, number in _left_out(counts) if number]
        lines += [
            (f"  {name}", f"{number:,} ({number / share:.1%})")
            for name, number in _remarks(counts, self.max_seq_length)
            if number
        ]
        lines += [
            (f"  of class {label}{name and f', {name}'}", f"{number:,} ({number / share:.1%})")
            for label, (number, name) in enumerate(zip(counts.classes, names, strict=True))
        ]
        lines += [
            ("tokens", f"{counts.tokens:,}"),
            ("tokens of a whole document", "  ".join(f"{name} {n:,}" for name, n in counts.whole_lengths.items())),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join([counts.source, *(f"  {name:<{width}}  {value}" for name, value in lines)])


def _left_out(counts: LabelCounts) -> list[tuple[str, int]]:
    return [
        ("not among them: on the other side of the split", counts.held_out),
        ("not among them: dropped, in the evaluation data too", counts.dropped),
    ]


def _remarks(counts: LabelCounts, max_seq_length: int) -> list[tuple[str, int]]:
    undone = "undone" if counts.cleaned else "left (clean_text: true undoes them)"
    return [
        *((f"{how} in the other data too", number) for how, number in counts.in_the_other.items()),
        (f"cut to {max_seq_length:,} tokens ({counts.overlong})", counts.cut),
        ("of an empty text, kept", counts.empty),
        ("with the text of an earlier one", counts.repeated),
        ("with the text of one of another class", counts.contradicting),
        (f"with HTML or escapes, {undone}", counts.marked),
    ]
