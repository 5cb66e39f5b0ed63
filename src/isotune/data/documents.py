"""Documents and rows as flat arrays, so that millions of them are mapped from disk and never become Python objects.

Both are kept in compressed sparse row form: one long array of values and `starts`, where item `i` owns
`values[starts[i] : starts[i + 1]]`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Documents:
    """Tokenised examples with their supervised mask.

        starts      0           3       5
        input_ids   2   8   9 | 2   7 |        two documents, of three and two tokens
        supervised  .   .   x | .   x |        x: this token is predicted from the token before it

    Attributes:
        input_ids: int32 [tokens].
        supervised: bool [tokens]; True where the token is a target. Nothing stands before the first token of a
            document, so that one is never True.
        starts: int64 [documents + 1].
        source_rows: int64 [documents]; the row of the source, counted from 0, that the document comes from.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    source_rows: np.ndarray

    def __len__(self) -> int:
        return len(self.source_rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 [documents]."""
        return np.diff(self.starts)

    @property
    def supervised_counts(self) -> np.ndarray:
        """Supervised tokens of each document: int64 [documents]."""
        running_total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.supervised, dtype=np.int64)])
        return np.diff(running_total[self.starts])


@dataclass(frozen=True)
class LabelledDocuments:
    """Tokenised texts with a class each; special tokens are in place, so the first token is the one a head reads.

        starts      0           3       5
        input_ids   C   8   S | C   S |            two documents, the second of an empty text
        labels      1           0

    Attributes:
        input_ids: int32 [tokens].
        labels: int32 [documents]; the class of each, from 0.
        starts: int64 [documents + 1].
        source_rows: int64 [documents]; the row of the source, counted from 0, that the document comes from.
        ids: int64 or text [documents], each once; what predictions name the document by: the data set's own id where
            it has one, else the source row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    source_rows: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.source_rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 [documents]."""
        return np.diff(self.starts)

    @property
    def supervised_counts(self) -> np.ndarray:
        """Targets of each document, int64 [documents]: its label is the only one."""
        return np.ones(len(self), np.int64)


AnyDocuments = Documents | LabelledDocuments


@dataclass(frozen=True)
class Rows:
    """Which documents share a row.

    Attributes:
        documents: int64 [documents]; document numbers, row after row.
        starts: int64 [rows + 1].
    """

    documents: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """The numbers of the documents in a row: int64 [documents in the row]."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.documents[self.starts[row] : self.starts[row + 1]]

    def lengths(self, document_lengths: np.ndarray) -> np.ndarray:
        """Tokens of each row, int64 [rows], given the tokens of each document, [documents]."""
        running_total = np.concatenate([np.zeros(1, np.int64), np.cumsum(document_lengths[self.documents])])
        return np.diff(running_total[self.starts])
