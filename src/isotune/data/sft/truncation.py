"""What happens to a conversation that is longer than a row: its end is cut, it is split, or it is dropped."""

from typing import Literal

import numpy as np

from isotune.data.documents import Documents
from isotune.data.tokenizer import add_special_tokens

Overlong = Literal["truncate", "split", "drop"]

_NO_TOKENS = np.zeros(0, np.int32)


def fit(
    whole: Documents, prefix: np.ndarray, max_seq_length: int, overlong: Overlong
) -> tuple[Documents, dict[str, int]]:
    """Bring tokenized conversations to at most `max_seq_length` tokens each, prefix included.

        max_seq_length 4, prefix b:   b 1 2 3 | b 4 5 6 | b 7        split, every piece behind a prefix of its own
                                      b 1 2 3                        truncate: the eos is cut with the rest

    A document's first token is predicted from nothing and so never supervised: without a prefix each piece of a split
    conversation loses at most that one. Documents without any supervised token are dropped.

    Args:
        whole: whole conversations, the prefix not yet in place.
        prefix: int32 [tokens that the tokenizer prepends].

    Returns:
        The documents, and conversations by what became of them: `truncated` and `split` are kept, `too_long` are
        dropped for their length, `answer_cut` because no supervised token was left; `pieces_dropped` are pieces
        without a supervised token, of conversations of which other pieces are kept.
    """
    room = max_seq_length - len(prefix)
    assert room >= 1 and max_seq_length >= 2, "no room for a token and its target"
    lengths = whole.lengths
    too_long = lengths > room
    position = np.arange(len(whole.input_ids)) - np.repeat(whole.starts[:-1], lengths)
    if overlong == "split":
        kept_tokens = np.ones(len(position), bool)
    elif overlong == "truncate":
        kept_tokens = position < room
    else:
        kept_tokens = np.repeat(~too_long, lengths)
    first_of_piece = (position % room == 0)[kept_tokens]
    piece_lengths = np.diff(np.append(np.flatnonzero(first_of_piece), len(first_of_piece)))
    conversation = np.repeat(np.arange(len(lengths)), lengths)[kept_tokens][first_of_piece]

    input_ids, starts, places = add_special_tokens(whole.input_ids[kept_tokens], piece_lengths, prefix, _NO_TOKENS)
    supervised = np.zeros(len(input_ids), bool)
    supervised[places] = whole.supervised[kept_tokens]
    supervised[starts[:-1]] = False
    documents = Documents(input_ids, supervised, starts, whole.source_rows[conversation])
    useful = documents.supervised_counts > 0
    survives = np.zeros(len(lengths), bool)
    survives[conversation[useful]] = True
    counts = {
        "truncated": int((too_long & survives).sum()) if overlong == "truncate" else 0,
        "split": int((too_long & survives).sum()) if overlong == "split" else 0,
        "too_long": int(too_long.sum()) if overlong == "drop" else 0,
        "answer_cut": int((~survives & ~too_long).sum() if overlong == "drop" else (~survives).sum()),
        "pieces_dropped": int(survives[conversation[~useful]].sum()),
    }
    return documents.select(useful), counts
