"""Pairs of texts as one text, wherever a row is compared, counted or shown; the model reads them as its tokenizer does.

A pair is the same as another one where both of its texts are, in their order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PAIR_MARK = " ||| "

# Columns of the data sets of GLUE and their like, of which one pair can only be meant as two texts.
KNOWN_PAIRS = (
    ("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("question", "sentence"), ("question", "passage"), ("question", "context"), ("query", "passage"),
    ("query", "document"), ("text1", "text2"), ("text_a", "text_b"), ("sentence_A", "sentence_B"),
    ("sentence_a", "sentence_b"), ("sent1", "sent2"),
)  # fmt: skip


def joined(texts: Sequence[str], others: Sequence[str] | None = None) -> list[str]:
    """Each text alone, or with the second one of its pair; a pair of two empty texts is an empty text."""
    if others is None:
        return list(texts)
    return [f"{one}{PAIR_MARK}{two}" if one or two else "" for one, two in zip(texts, others, strict=True)]


def text_of(row: Mapping[str, Any], column: str, pair_column: str | None) -> str:
    """The text of a row, or both of them."""
    return joined([row[column]], None if pair_column is None else [row[pair_column]])[0]


def known_pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of columns in a row that are known as two texts, whatever their case."""
    columns = {name.lower(): name for name in row}
    found = [(columns.get(one.lower()), columns.get(two.lower())) for one, two in KNOWN_PAIRS]
    return list(dict.fromkeys((one, two) for one, two in found if one is not None and two is not None))
