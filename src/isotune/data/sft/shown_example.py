"""One document as the model will see it, what is learnt marked: the surest way to notice a wrong form."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from isotune.data.documents import Documents

MAX_CHARACTERS = 2_000  # of a segment that is shown; the middle of a longer one is left out
COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"  # green


@dataclass(frozen=True)
class ShownExample:
    """A document in segments of tokens that are all learnt, or all not."""

    row: int  # of the source, counted from 0
    segments: list[tuple[str, bool]]  # text, and whether it is learnt

    @classmethod
    def of(cls, documents: Documents, document: int, tokenizer: Any) -> "ShownExample":
        """The segments of one document, special tokens written out."""
        tokens = slice(int(documents.starts[document]), int(documents.starts[document + 1]))
        ids, learnt = np.asarray(documents.input_ids[tokens]), np.asarray(documents.supervised[tokens])
        borders = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(ids)]
        segments: list[tuple[str, bool]] = []
        for start, end in pairwise(borders):
            text = tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False)
            segments.append((_shortened(text), bool(learnt[start])))
        return cls(int(documents.source_rows[document]), segments)

    def text(self, *, colour: bool) -> str:
        """The document with what is learnt in colour, else in brackets."""
        opening, closing = (COLOUR, PLAIN) if colour else ("[", "]")
        return "".join(f"{opening}{text}{closing}" if learnt else text for text, learnt in self.segments)

    def lines(self, *, colour: bool) -> str:
        """What a run prints before its first step."""
        how = "in colour" if colour else "in brackets"
        body = self.text(colour=colour).replace("\n", "\n            ")
        return f"example     row {self.row + 1}; what is learnt stands {how}:\n            {body}"


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"
