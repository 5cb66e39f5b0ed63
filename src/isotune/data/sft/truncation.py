"""What happens to a conversation that is longer than a row: its end is cut, it is split, or it is dropped."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from isotune.data.documents import Documents
from isotune.data.sft.tokenization import Encoded

Overlong = Literal["truncate", "split", "drop"]


@dataclass(frozen=True)
class FitCounts:
    """What fitting did to a batch of conversations.

    Attributes:
        truncated: conversations whose end was cut and that are kept.
        split: conversations that became several pieces, of which some are kept.
        dropped_too_long: dropped because they are longer than allowed.
        dropped_answer_cut: dropped because no supervised token was left.
        pieces_dropped: pieces without a supervised token, of conversations of which other pieces are kept.
    """

    truncated: int
    split: int
    dropped_too_long: int
    dropped_answer_cut: int
    pieces_dropped: int


def fit(
    encoded: Encoded, source_rows: np.ndarray, prefix: np.ndarray, max_seq_length: int, overlong: Overlong
) -> tuple[Documents, FitCounts]:
    """Bring tokenised conversations to at most `max_seq_length` tokens each, prefix included.

        max_seq_length 4, prefix b:   b 1 2 3 | b 4 5 6 | b 7        split, every piece behind a prefix of its own
                                      b 1 2 3                        truncate: the eos is cut with the rest

    A document's first token is predicted from nothing and so never supervised: without a prefix each piece of a split
    conversation loses at most that one. Documents without any supervised token are dropped.

    Args:
        encoded: whole conversations, the prefix not yet in place.
        source_rows: int64 [conversations]; the rows that they come from.
        prefix: int32 [tokens that the tokenizer prepends].
    """
    lengths = np.diff(encoded.starts)
    room = max_seq_length - len(prefix)
    assert room >= 1 and max_seq_length >= 2, "no room for a token and its target"
    too_long = lengths > room
    position = np.arange(len(encoded.input_ids)) - np.repeat(encoded.starts[:-1], lengths)
    if overlong == "split":
        kept_tokens = np.ones(len(position), bool)
    elif overlong == "truncate":
        kept_tokens = position < room
    else:
        kept_tokens = np.repeat(~too_long, lengths)
    starts_piece = (position % room == 0)[kept_tokens]
    pieces = _with_prefix(encoded.input_ids[kept_tokens], encoded.supervised[kept_tokens], starts_piece, prefix)
    conversation = np.repeat(np.arange(len(lengths)), lengths)[kept_tokens][starts_piece]

    documents = Documents(*pieces, source_rows=source_rows[conversation])
    useful = documents.supervised_counts > 0
    survives = np.zeros(len(lengths), bool)
    survives[conversation[useful]] = True
    counts = FitCounts(
        truncated=int((too_long & survives).sum()) if overlong == "truncate" else 0,
        split=int((too_long & survives).sum()) if overlong == "split" else 0,
        dropped_too_long=int(too_long.sum()) if overlong == "drop" else 0,
        dropped_answer_cut=int((~survives & ~too_long).sum() if overlong == "drop" else (~survives).sum()),
        pieces_dropped=int(survives[conversation[~useful]].sum()),
    )
    return _select(documents, useful), counts


def _with_prefix(
    input_ids: np.ndarray, supervised: np.ndarray, starts_piece: np.ndarray, prefix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the prefix before every piece; returns input_ids, supervised and starts of the pieces."""
    first = np.flatnonzero(starts_piece)
    place = np.arange(len(input_ids)) + len(prefix) * np.cumsum(starts_piece)
    starts = np.append(first, len(input_ids)) + len(prefix) * np.arange(len(first) + 1)
    all_ids = np.empty(int(starts[-1]), np.int32)
    all_supervised = np.zeros(int(starts[-1]), bool)
    all_ids[place] = input_ids
    all_supervised[place] = supervised
    for offset, token in enumerate(prefix.tolist()):
        all_ids[starts[:-1] + offset] = token
    all_supervised[starts[:-1]] = False
    return all_ids, all_supervised, starts


def _select(documents: Documents, chosen: np.ndarray) -> Documents:
    """The documents where `chosen`, bool [documents], is true."""
    tokens = np.repeat(chosen, documents.lengths)
    lengths = documents.lengths[chosen]
    return Documents(
        documents.input_ids[tokens],
        documents.supervised[tokens],
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        documents.source_rows[chosen],
    )
