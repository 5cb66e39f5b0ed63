"""What preparation did to the data, counted: as a table to read and as numbers to keep."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class DocumentCounts:
    """What became of the rows of a source; the same for every packing and seed.

    Attributes:
        source: where the rows came from.
        read, kept: rows of the source. `read` is `kept` plus all of `dropped`.
        truncated, split: kept rows that were longer than max_seq_length.
        dropped: rows by the reason for which they are not trained on.
        documents: what is trained on; more than `kept` where rows were split.
        pieces_dropped: pieces of split rows that held no supervised token.
        turns_cut: turns after the last answer of a conversation, left out.
        tokens, supervised_tokens: of the documents.
        straddling_tokens: supervised tokens that also cover a character outside their answer.
        special_texts: conversations in which the eos token is written out, encoded as ordinary text.
        whole_lengths: quantiles of the tokens of a conversation before anything was cut.
    """

    source: str
    read: int
    kept: int
    truncated: int
    split: int
    dropped: dict[str, int]
    documents: int
    pieces_dropped: int
    turns_cut: int
    tokens: int
    supervised_tokens: int
    straddling_tokens: int
    special_texts: int
    whole_lengths: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparationTable:
    """The counts of the documents and of the rows that they were put in; `str()` is the table to print.

    Attributes:
        rows: how many rows there are.
        row_capacity: tokens that a row may hold, max_seq_length.
        packing: whether rows hold more than one document.
        packing_efficiency: the share of all rows' capacity that tokens fill.
    """

    documents: DocumentCounts
    rows: int
    row_capacity: int
    packing: bool

    @property
    def packing_efficiency(self) -> float:
        return self.documents.tokens / (self.rows * self.row_capacity)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        return {
            **asdict(self.documents),
            "rows": self.rows,
            "row_capacity": self.row_capacity,
            "packing": self.packing,
            "packing_efficiency": self.packing_efficiency,
        }

    def __str__(self) -> str:
        counts = self.documents
        lines = [("documents read", f"{counts.read:,}"), ("  kept", f"{counts.kept:,}")]
        lines += [(f"  {name}", f"{number:,}") for name, number in _cut(counts) if number]
        lines += [(f"  dropped: {reason}", f"{number:,}") for reason, number in counts.dropped.items() if number]
        lines += [(name, f"{number:,}") for name, number in _remarks(counts) if number]
        share = counts.supervised_tokens / counts.tokens
        lines += [
            ("tokens", f"{counts.tokens:,}"),
            ("  supervised", f"{counts.supervised_tokens:,} ({share:.1%})"),
            (f"rows of {self.row_capacity:,} tokens", f"{self.rows:,}"),
            ("  filled" if self.packing else "  filled (not packed)", f"{self.packing_efficiency:.2%}"),
            ("tokens of a whole document", "  ".join(f"{name} {n:,}" for name, n in counts.whole_lengths.items())),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join([counts.source, *(f"  {name:<{width}}  {value}" for name, value in lines)])


def length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths that really occur, at the shares of QUANTILES: tokens by name."""
    if not len(lengths):
        return {}
    found = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
    return {name: int(tokens) for name, tokens in zip(QUANTILES, found, strict=True)}


def _cut(counts: DocumentCounts) -> list[tuple[str, int]]:
    return [("truncated", counts.truncated), ("split", counts.split)]


def _remarks(counts: DocumentCounts) -> list[tuple[str, int]]:
    return [
        ("pieces after splitting", counts.documents if counts.split else 0),
        ("  dropped: no supervised token", counts.pieces_dropped),
        ("turns after the last answer, left out", counts.turns_cut),
        ("tokens across an answer's edge", counts.straddling_tokens),
        ("texts with the eos token written out", counts.special_texts),
    ]
