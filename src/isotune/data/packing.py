"""Fills rows with whole documents, so that no computation goes into padding and no document is cut to fit.

The heuristic is best-fit-decreasing: the longest document first, each into the fullest row that still has room for
it (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). It is fast for a million documents because it
never places them one by one: documents of one length are interchangeable, and so are rows with the same room left.
"""

import numpy as np

from isotune.data.documents import Rows, starts_of


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Rows:
    """Put every document into one row.

        capacity 8, lengths 5 3 7 2 4 1:          row 0   c c c c c c c f
                    a b c d e f                   row 1   a a a a a b b b
                                                  row 2   e e e e d d . .

    The number of rows is that of the sequential best-fit-decreasing, exactly. Equal input gives equal rows on every
    machine; which of the documents of one length goes where depends on the seed, so that a row's content does not
    follow the order of the source. `lengths` are the tokens of each document, [documents], from 1 to `capacity`; a row
    has its documents from the longest to the shortest.
    """
    documents = len(lengths)
    if documents == 0:
        return Rows(np.zeros(0, np.int64), np.zeros(1, np.int64))
    assert lengths.min() >= 1 and lengths.max() <= capacity, "a document is empty or longer than a row"

    order = _longest_first(lengths, capacity, seed)
    documents_of_length = np.bincount(lengths, minlength=capacity + 1)
    row_of = np.empty(documents, np.int64)  # by place in `order`
    open_rows = _OpenRows(capacity)
    place = 0
    for length in np.flatnonzero(documents_of_length)[::-1].tolist():
        waiting = int(documents_of_length[length])
        # The fullest row with room for one document also fits the next one best, while it has room for it. So each
        # row takes as many documents of this length as it can before the next row is considered, an unused one last.
        for room in [*(np.flatnonzero(open_rows.sizes[length:]) + length).tolist(), capacity]:
            per_row = room // length
            rows, in_last = open_rows.take(room, waiting, per_row)
            placed = (len(rows) - 1) * per_row + in_last
            row_of[place : place + placed] = np.repeat(rows, per_row)[:placed]
            open_rows.put(rows[:-1], room - per_row * length)
            open_rows.put(rows[-1:], room - in_last * length)
            place += placed
            waiting -= placed
            if not waiting:
                break
    by_row = np.argsort(row_of, kind="stable")
    return Rows(order[by_row], starts_of(np.bincount(row_of, minlength=open_rows.count)))


def one_document_per_row(documents: int, epochs: int = 1) -> Rows:
    """The rows of an unpacked run: each document is its own row, in the order of the documents, of all `epochs`."""
    return Rows(np.arange(documents, dtype=np.int64), np.arange(documents + 1, dtype=np.int64), epochs)


class _OpenRows:
    """Row numbers by remaining room, kept as arrays; a row that was never used has room for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self.sizes = np.zeros(capacity + 1, np.int64)

    def take(self, room: int, waiting: int, per_row: int) -> tuple[np.ndarray, int]:
        """Take the rows of this room that `waiting` documents need, `per_row` to a row.

        Returns the row numbers, and how many documents the last of them gets: `per_row`, or what is left over.
        """
        needed = -(-waiting // per_row)
        if room == self.capacity:
            rows = np.arange(self.count, self.count + needed)
            self.count += needed
        else:
            available = np.concatenate(self.by_room[room])
            rows, rest = available[:needed], available[needed:]
            self.by_room[room] = [rest] if len(rest) else []
            self.sizes[room] = len(rest)
        return rows, min(per_row, waiting - (len(rows) - 1) * per_row)

    def put(self, rows: np.ndarray, room: int) -> None:
        """Return rows with the room that they have left."""
        if len(rows) and room:
            self.by_room[room].append(rows)
            self.sizes[room] += len(rows)


def _longest_first(lengths: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    """Document numbers by decreasing length; equal lengths are shuffled by the seed. int64 [documents].

    Raw bits of the generator are the same in every version of numpy, which its `permutation` does not promise.
    """
    shuffled = np.argsort(np.random.PCG64(seed).random_raw(len(lengths)), kind="stable")
    shortness = capacity - lengths[shuffled]
    narrow = np.uint16 if capacity < 2**16 else np.int64  # numpy sorts 16 bits by counting
    return shuffled[np.argsort(shortness.astype(narrow), kind="stable")]
