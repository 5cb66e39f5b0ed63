"""A tokenizer's Rust backend, made ready to tokenize texts of any length without touching the original.

What a classifier reads is made here too: the tokenizer's own special tokens around each text, within max_seq_length.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from isotune.config.recipes import OverlongText
from isotune.data.documents import FIRST_TYPE, Documents, digest, starts_of
from isotune.io.errors import UserError

HEAD_SHARE = 4  # head_tail keeps a quarter from the start: 128 of 510, as Sun et al. 2019 found best for IMDb


def tokenizer_name(tokenizer: Any) -> str:
    """How messages name a tokenizer: its folder or Hub id, else its class."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


@dataclass(frozen=True)
class PairForm:
    """What a tokenizer puts around two texts: `[CLS] A [SEP] B [SEP]`, or `<s> A </s></s> B </s>`."""

    prefix: np.ndarray  # int32, before the first text
    middle: np.ndarray  # between the two
    suffix: np.ndarray  # after the second
    types: tuple[int, ...] | None  # of prefix, A, middle, B and suffix; None where the model gets no token_type_ids

    @classmethod
    def of(cls, probe: Any, tokenizer: Any) -> "PairForm | None":
        """That of the encoding of two texts; None where the tokenizer has no form for two."""
        ids, sequences = np.array(probe.ids, np.int32), [-1 if s is None else s for s in probe.sequence_ids]
        one, two = (np.flatnonzero(np.array(sequences) == number) for number in (0, 1))
        if not len(one) or not len(two) or one[-1] > two[0]:
            return None
        pieces = (slice(0, one[0]), slice(one[0], one[-1] + 1), slice(one[-1] + 1, two[0]),
                  slice(two[0], two[-1] + 1), slice(two[-1] + 1, len(ids)))  # fmt: skip
        types = None
        if "token_type_ids" in tokenizer.model_input_names and any(probe.type_ids):
            types = tuple(max(probe.type_ids[piece], default=-1) for piece in pieces)
        return cls(ids[pieces[0]], ids[pieces[2]], ids[pieces[4]], types)

    @property
    def special_tokens(self) -> int:
        """Tokens that every pair gets beside its own."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    @property
    def has_types(self) -> bool:
        """Whether the second text and what follows it are of another token type than all before."""
        return self.types is not None

    def facts(self) -> list[Any]:
        """All that decides the tokens, for fingerprints."""
        return [self.prefix.tolist(), self.middle.tolist(), self.suffix.tolist(), self.types]


def prefix_of(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text."""
    probe = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    return probe.ids[: probe.special_tokens_mask.index(0)]


class FastTokenizer:
    """A private copy of a tokenizer's Rust backend that neither cuts nor pads.

    A special token written out in a text, such as `</s>`, is encoded like any other characters and never becomes the
    special token.

    UserError where the tokenizer, of `transformers`, has no Rust backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.name = tokenizer_name(tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer {self.name} has no fast form: save its tokenizer.json")
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        probe = self.backend.encode("a", add_special_tokens=True)
        self._pair = PairForm.of(self.backend.encode("a", "a", add_special_tokens=True), tokenizer)
        own = np.flatnonzero(np.array(probe.special_tokens_mask) == 0)
        self.prefix = np.array(probe.ids[: own[0]], np.int32)  # what the tokenizer puts before a text
        self.suffix = np.array(probe.ids[own[-1] + 1 :], np.int32)
        self.definition = str(self.backend.to_str())  # for fingerprints
        self.backend.post_processor = None  # which would trim offsets of their leading space
        self.backend.encode_special_tokens = True


def add_special_tokens(
    input_ids: np.ndarray, lengths: np.ndarray, prefix: np.ndarray, suffix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put a prefix before and a suffix after each text: of `lengths` tokens, int64 [texts], end to end in `input_ids`.

    Returns int32 input_ids with them; starts, int64 [texts + 1]; and where each own token of a text went, int64.
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


class TextEncoder(FastTokenizer):
    """A tokenizer made ready to turn texts into `[CLS] ... [SEP]`, or whatever it puts around a text.

    An empty text becomes the special tokens alone; where the tokenizer puts none around a text, as those of many
    decoders, its eos token. `fingerprint` is a digest of everything that decides the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._tokenizer = tokenizer
        self.special_tokens = len(self.prefix) + len(self.suffix)  # that every text gets beside its own
        around = [self.prefix.tolist(), self.suffix.tolist()]
        empty = [] if self.special_tokens else [getattr(tokenizer, "eos_token_id", None)]
        self.fingerprint = digest(self.definition, *around, *empty)

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text alone, int32, whole and without special tokens; on all cores at once."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode(
        self, texts: Sequence[str], max_seq_length: int, overlong: OverlongText, labels: np.ndarray | None = None
    ) -> Documents:
        """Tokenize texts, and cut what is longer than `max_seq_length` tokens.

            head        C 1 2 3 4 S          the first that fit
            tail        C 5 6 7 8 S          the last
            head_tail   C 1 6 7 8 S          a quarter from the start, the rest from the end

        `labels` are int32 [texts]; class 0 for all where nobody knows them. The documents have the column
        `whole_lengths`, the tokens of each before anything was cut, int64.
        """
        tokens = self.tokens(texts)
        whole_lengths = np.array([len(ids) for ids in tokens], np.int64) + self.special_tokens
        if not self.special_tokens:
            tokens = [ids if len(ids) else self._nothing for ids in tokens]
        own = np.array([len(ids) for ids in tokens], np.int64)
        room = max_seq_length - self.special_tokens
        first = {"head": room, "tail": 0, "head_tail": room // HEAD_SHARE}[overlong]
        position = np.arange(int(own.sum())) - np.repeat(np.cumsum(own) - own, own)
        whole = np.repeat(own, own)
        kept = (whole <= room) | (position < first) | (position >= whole - (room - first))
        ids = np.concatenate(tokens)[kept]
        input_ids, starts, _ = add_special_tokens(ids, np.minimum(own, room), self.prefix, self.suffix)
        return Documents(
            input_ids=input_ids,
            targets=np.zeros(len(texts), np.int32) if labels is None else labels,
            starts=starts,
            source_rows=np.arange(len(texts)),
            columns={"whole_lengths": whole_lengths},
        )

    @cached_property
    def _nothing(self) -> np.ndarray:
        """What stands for an empty text that gets no special token: a model reads one token at least."""
        eos = getattr(self._tokenizer, "eos_token_id", None)
        if eos is None:
            raise UserError(
                f"a text is empty, and the tokenizer {self.name} has neither special tokens around a text nor an eos "
                "token that could stand for it: leave such rows out"
            )
        return np.array([eos], np.int32)

    def pair_form(self) -> PairForm:
        """How two texts stand in one document; UserError where the tokenizer cannot say so."""
        if self._pair is None or not len(self._pair.prefix):
            raise UserError(
                f"the tokenizer {self.name} has no form for two texts, such as [CLS] A [SEP] B [SEP], so "
                "dataset_text_pair_field needs another one"
            )
        if self._pair.types is not None and not _in_two(self._pair.types):
            types = ", ".join(map(str, self._pair.types))
            raise UserError(
                f"the tokenizer {self.name} gives two texts the token types {types}: only 0 for the first and 1 for "
                "the second are known here"
            )
        return self._pair

    def encode_pairs(
        self, texts: Sequence[str], others: Sequence[str], max_seq_length: int, overlong: OverlongText
    ) -> Documents:
        """Tokenize pairs of texts in the tokenizer's own form; `overlong` says which part of each text is kept.

        Both share the room: the longer one is cut first, as with `truncation="longest_first"`. The documents have the
        column `whole_lengths`, and FIRST_TYPE where the model is told which text a token is of. Their class is 0.
        """
        form = self.pair_form()
        room = max_seq_length - form.special_tokens
        parts: list[np.ndarray] = []
        wholes, lengths, first = (np.zeros(len(texts), np.int64) for _ in range(3))
        for row, (one, two) in enumerate(zip(self.tokens(texts), self.tokens(others), strict=True)):
            wholes[row] = len(one) + len(two) + form.special_tokens
            kept_one, kept_two = shares_of_room(len(one), len(two), room)
            one, two = cut(one, kept_one, overlong), cut(two, kept_two, overlong)
            parts += [form.prefix, one, form.middle, two, form.suffix]
            first[row] = len(form.prefix) + kept_one + len(form.middle)
            lengths[row] = kept_one + kept_two + form.special_tokens
        return Documents(
            input_ids=np.concatenate(parts).astype(np.int32),
            targets=np.zeros(len(texts), np.int32),
            starts=starts_of(lengths),
            source_rows=np.arange(len(texts)),
            columns={"whole_lengths": wholes, **({FIRST_TYPE: first} if form.has_types else {})},
        )


def shares_of_room(one: int, two: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept of which `room` fit together: the longer one is cut down to the other."""
    if one + two <= room:
        return one, two
    short, long = min(one, two), max(one, two)
    long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (short, long) if one <= two else (long, short)


def cut(tokens: np.ndarray, kept: int, overlong: OverlongText) -> np.ndarray:
    """The `kept` tokens of a text that `overlong` says."""
    if len(tokens) <= kept:
        return tokens
    first = {"head": kept, "tail": 0, "head_tail": kept // HEAD_SHARE}[overlong]
    return np.concatenate([tokens[:first], tokens[len(tokens) - (kept - first) :]])


def _in_two(types: tuple[int, ...]) -> bool:
    """Whether all before the second text is of type 0, and the rest of type 1; -1 is of a part without tokens."""
    return set(types[:3]) <= {0, -1} and set(types[3:]) <= {1, -1}
