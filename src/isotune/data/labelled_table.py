"""What preparation did to labelled texts, counted: as a table to read and as numbers to keep."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LabelCounts:
    """What became of the rows of a source; each is one document.

    Attributes:
        source: where the rows came from.
        documents: rows, all kept.
        cut: texts that were longer than max_seq_length, and by `overlong` what is left of them.
        empty: texts without a token of their own, kept as the special tokens alone.
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
        lines = [("documents", f"{counts.documents:,}")]
        if counts.cut:
            name = f"  cut to {self.max_seq_length:,} tokens ({counts.overlong})"
            lines.append((name, f"{counts.cut:,} ({counts.cut / counts.documents:.1%})"))
        if counts.empty:
            lines.append(("  of an empty text, kept", f"{counts.empty:,}"))
        lines += [
            (f"  of class {label}", f"{number:,} ({number / counts.documents:.1%})")
            for label, number in enumerate(counts.classes)
        ]
        lines += [
            ("tokens", f"{counts.tokens:,}"),
            ("tokens of a whole document", "  ".join(f"{name} {n:,}" for name, n in counts.whole_lengths.items())),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join([counts.source, *(f"  {name:<{width}}  {value}" for name, value in lines)])
