"""What became of labelled texts, as the table that preparation prints.

documents       those that are used; each row of the source that is used is one
cut, overlong   texts that were longer than max_seq_length, and what is left of them
empty           texts without a token of their own, kept as the special tokens alone
tokens          of the documents, special tokens included
classes, class_names    documents of each class, and the names where there are any
whole_lengths   quantiles of the tokens of a text before anything was cut
repeated        documents whose text an earlier one has; empty texts do not count
contradicting   documents whose text another one has under another class
marked, cleaned texts with HTML breaks, entities or escapes, and whether they were undone
held_out        rows that `eval_split_share` gave to the other side of the split
in_the_other    documents that stand, exactly or nearly, in the other of training and evaluation data too
dropped         documents left out of training because of that (`drop_leaked`)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from isotune.data.clean_text import EMPTY
from isotune.data.counts_table import CountsTable, count_lines, length_quantiles, lengths_line
from isotune.data.documents import Documents


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
    """Count labelled documents.

    Args:
        documents: with the column `whole_lengths`, and `contents` and `marked` where those are known.
        num_labels: the classes that are shown at least.
        special_tokens: the length of an empty text.
        remarks: `held_out`, `in_the_other` and `dropped`, which only the caller knows.
    """
    whole_lengths = documents.columns["whole_lengths"]
    contents = documents.columns.get("contents", np.zeros(0, np.uint64))
    counts = {
        "documents": len(documents),
        "cut": int((whole_lengths > max_seq_length).sum()),
        "overlong": overlong,
        "empty": int((whole_lengths == special_tokens).sum()),
        "tokens": len(documents.input_ids),
        "classes": np.bincount(documents.labels, minlength=num_labels).tolist(),
        "whole_lengths": length_quantiles(whole_lengths),
        "class_names": list(class_names) if class_names else None,
        "repeated": _repeated(contents),
        "contradicting": _contradicting(contents, documents.labels[: len(contents)]),
        "marked": int(documents.columns["marked"].sum()) if "marked" in documents.columns else 0,
        "cleaned": cleaned,
        "held_out": 0,
        "in_the_other": {},
        "dropped": 0,
        **remarks,
        "max_seq_length": max_seq_length,
    }
    return CountsTable(source, counts, tuple(_lines(counts)))


def _repeated(contents: np.ndarray) -> int:
    """Documents whose text an earlier one has; `contents`: uint64 [documents]."""
    contents = contents[contents != np.uint64(EMPTY)]
    return len(contents) - len(np.unique(contents))


def _contradicting(contents: np.ndarray, labels: np.ndarray) -> int:
    """Documents whose text another one has under another class; `contents`, `labels`: [documents]."""
    told = contents != np.uint64(EMPTY)
    contents, labels = contents[told], labels[told]
    _, which = np.unique(contents, return_inverse=True)
    pairs = np.unique(np.stack([which, labels]), axis=1)
    classes_of_text = np.bincount(pairs[0], minlength=1)
    return int((classes_of_text[which] > 1).sum())


def _lines(counts: dict[str, Any]) -> list[tuple[str, str]]:
    documents: int = counts["documents"]
    classes: list[int] = counts["classes"]
    names: list[str] = counts["class_names"] or [""] * len(classes)
    in_the_other: dict[str, int] = counts["in_the_other"]
    undone = "undone" if counts["cleaned"] else "left (clean_text: true undoes them)"
    return [
        *count_lines([("documents", documents)], keep_zeros=True),
        *count_lines(
            [
                ("  not among them: on the other side of the split", counts["held_out"]),
                ("  not among them: dropped, in the evaluation data too", counts["dropped"]),
            ]
        ),
        *count_lines(
            [
                *((f"  {how} in the other data too", number) for how, number in in_the_other.items()),
                (f"  cut to {counts['max_seq_length']:,} tokens ({counts['overlong']})", counts["cut"]),
                ("  of an empty text, kept", counts["empty"]),
                ("  with the text of an earlier one", counts["repeated"]),
                ("  with the text of one of another class", counts["contradicting"]),
                (f"  with HTML or escapes, {undone}", counts["marked"]),
            ],
            share_of=documents,
        ),
        *count_lines(
            (
                (f"  of class {label}{name and f', {name}'}", number)
                for label, (number, name) in enumerate(zip(classes, names, strict=True))
            ),
            share_of=documents,
            keep_zeros=True,
        ),
        *count_lines([("tokens", counts["tokens"])], keep_zeros=True),
        lengths_line(counts["whole_lengths"]),
    ]
