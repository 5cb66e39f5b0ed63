"""What preparation did to a data set, counted: a table to read and numbers to keep."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}

Line = tuple[str, str]


@dataclass(frozen=True)
class CountsTable:
    """The counts of a prepared data set; `str()` is the table to print.

    Attributes:
        source: where the rows came from.
        counts: plain numbers by name, for a JSON file.
        lines: what is printed, name and value.
    """

    source: str
    counts: dict[str, Any]
    lines: tuple[Line, ...]

    def as_dict(self) -> dict[str, Any]:
        """The source and its counts, for a JSON file."""
        return {"source": self.source, **self.counts}

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        return "\n".join([self.source, *(f"  {name:<{width}}  {value}" for name, value in self.lines)])


def count_lines(
    counts: Iterable[tuple[str, int]], *, share_of: int | None = None, keep_zeros: bool = False
) -> list[Line]:
    """Lines of a table: thousands separated, with the share of `share_of` where that is given."""
    return [
        (name, f"{count:,}" if share_of is None else f"{count:,} ({count / max(share_of, 1):.1%})")
        for name, count in counts
        if count or keep_zeros
    ]


def lengths_line(quantiles: dict[str, int]) -> Line:
    """The line of the lengths before anything was cut."""
    return "tokens of a whole document", "  ".join(f"{name} {tokens:,}" for name, tokens in quantiles.items())


def length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths that really occur, at the shares of QUANTILES: tokens by name."""
    if not len(lengths):
        return {}
    values = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
    return {name: int(tokens) for name, tokens in zip(QUANTILES, values, strict=True)}
