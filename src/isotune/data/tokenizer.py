"""A tokenizer's Rust backend, made ready to tokenize texts of any length without touching the original."""

import copy
from typing import Any

import numpy as np

from isotune.data.documents import starts_of
from isotune.io.errors import UserError


class FastTokenizer:
    """A private copy of a tokenizer's Rust backend that neither cuts nor pads.

    A special token written out in a text, such as `</s>`, is encoded like any other characters and never becomes the
    special token.

    Attributes:
        name: how error sentences name the tokenizer.
        prefix, suffix: int32 [tokens that the tokenizer puts before and after a text].
        definition: the tokenizer as JSON, for fingerprints.
        backend: adds no special tokens and has no post-processor, so no offset is trimmed of its leading space.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Copy the backend of a `transformers` tokenizer.

        Raises:
            UserError: it has no Rust backend.
        """
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer {self.name} has no fast form: save its tokenizer.json")
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        probe = self.backend.encode("a", add_special_tokens=True)
        own = np.flatnonzero(np.array(probe.special_tokens_mask) == 0)
        self.prefix = np.array(probe.ids[: own[0]], np.int32)
        self.suffix = np.array(probe.ids[own[-1] + 1 :], np.int32)
        self.definition = str(self.backend.to_str())
        self.backend.post_processor = None
        self.backend.encode_special_tokens = True


def add_special_tokens(
    input_ids: np.ndarray, lengths: np.ndarray, prefix: np.ndarray, suffix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put a prefix before and a suffix after each text.

    Args:
        input_ids: int32 [tokens] of the texts, end to end.
        lengths: int64 [texts]; tokens of each.

    Returns:
        input_ids with the special tokens; starts, int64 [texts + 1]; and where each of the texts' own tokens went,
        int64 [tokens].
    """
    special = len(prefix) + len(suffix)
    starts = starts_of(lengths + special)
    places = np.arange(len(input_ids)) + np.repeat(np.arange(len(lengths)) * special + len(prefix), lengths)
    out = np.empty(int(starts[-1]), np.int32)
    out[places] = input_ids
    for offset, token in enumerate(prefix.tolist()):
        out[starts[:-1] + offset] = token
    for offset, token in enumerate(reversed(suffix.tolist()), start=1):
        out[starts[1:] - offset] = token
    return out, starts, places
