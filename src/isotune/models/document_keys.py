"""The random numbers of dropout: each is a function of its call, its document, and its place in the document.

    key of a call       one draw of torch's default CPU generator, which is seeded alike for every microbatch of a step
    key of a document   hash(key of the call, the document's number in the data)
    key of a line       hash(key of the document, the position, and the index on every other axis but the last)
    number of an element, 16 bits    of mix(key of the line, index on the last axis // 4): four elements share a word

So a document gets the same mask in every row, beside any neighbours, packed or padded, on any rank and device. Every
call of a step draws one key, and all microbatches make the same calls; gradient checkpointing restores the generator.

The hash is the finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")
on key + (index + 1) * an odd constant, so each level is a splitmix64 generator seeded by the level above. The last
level has most of the work and starts from keys that are mixed already. There mix is shorter: key XOR (index + 1) * the
odd constant, times an odd factor, its upper half XOR-ed onto the lower, times another. All of it is arithmetic modulo
2**64. Every step of mix can be reversed, so over all keys of a line a word takes each value once: its four numbers are
uniform and independent of each other. A probability is rounded to 1/65536.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from isotune.io.errors import RunFault

RESOLUTION = 2**16
ELEMENTS_PER_WORD = 4
INCREMENT = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # shift and factor
LAST_SHIFT = 31
HALF = 32

_INCREMENT, _LAST_SHIFT, _HALF = np.uint64(INCREMENT), np.uint64(LAST_SHIFT), np.uint64(HALF)
_ROUNDS = tuple((np.uint64(shift), np.uint64(factor)) for shift, factor in ROUNDS)


@dataclass(frozen=True, eq=False)
class MicrobatchDocuments:
    """Which documents a forward and backward pass sees, in their order."""

    numbers: Sequence[int]  # of the documents in the data
    lengths: Sequence[int]  # their tokens
    padded: bool = False  # a line of a batch each, filled up to the longest; otherwise end to end in one row
    # the numbers and the lengths on the device, int64 [2, documents], where they have been moved there already
    on_device: torch.Tensor | None = None

    def axes(self, shape: Sequence[int]) -> tuple[bool, list[int]]:
        """Where the documents are in a tensor of this shape, and its axes below them without the last.

        Returns true for an axis of all tokens, end to end, and false for an axis of documents. A packed tensor is
        [1, tokens, ..., n], [tokens, ..., n] or [documents, ..., n], a padded one [documents * any number, ..., n].
        RunFault where the documents of the tensor cannot be told.
        """
        documents, tokens, inner = len(self.numbers), sum(self.lengths), list(shape[1:-1])
        if len(shape) > 1 and self.padded and shape[0] % documents == 0:
            per_document = shape[0] // documents
            return False, inner if per_document == 1 and inner else [per_document, *inner]
        if len(shape) > 2 and not self.padded and tuple(shape[:2]) == (1, tokens):
            return True, inner[1:]
        if len(shape) > 1 and not self.padded and shape[0] == tokens:
            return True, inner
        if len(shape) > 1 and not self.padded and shape[0] == documents:
            return False, inner or [1]  # its first token
        form = "padded" if self.padded else "packed"
        raise RunFault(
            f"this model drops elements of a tensor {list(shape)}, whose documents cannot be told in a {form} "
            f"microbatch of {documents} documents and {tokens} tokens: set its dropout to 0 or report its type"
        )

    def places(self, by_token: bool, per_document: int) -> tuple[np.ndarray, np.ndarray]:
        """The document of each token, or `per_document` times each document; and the positions. int64 [lines]."""
        lengths = np.asarray(self.lengths if by_token else [per_document] * len(self.numbers), np.int64)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(np.asarray(self.numbers, np.int64), lengths), np.arange(len(starts)) - starts

    @cached_property
    def _positions(self) -> np.ndarray:
        """Of each token in its document, int64 [tokens]."""
        return self.places(True, 0)[1]

    def line_keys(self, shape: Sequence[int], call: int) -> np.ndarray:
        """The keys of all lines of a tensor of this shape, uint64 [product of all axes but the last]."""
        by_token, inner = self.axes(shape)
        keys = document_keys(call, self.numbers)
        if by_token:
            keys = _next(np.repeat(keys, self.lengths), self._positions)
        for length in inner:
            keys = index_keys(keys, length).reshape(-1)
        return keys


def draw_call_key() -> int:
    """The key of one dropout call, from torch's default CPU generator."""
    return int(torch.randint(2**62, (), device="cpu"))


def document_keys(call: int, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """The key of each document, uint64 [documents]."""
    return _next(hashed(np.array([call], np.uint64)), np.asarray(numbers))


def index_keys(keys: np.ndarray, length: int) -> np.ndarray:
    """The keys one axis further in, uint64 [..., length]."""
    return _next(keys[..., None], np.arange(length))


def _next(keys: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return hashed(keys + (indices.astype(np.uint64) + np.uint64(1)) * _INCREMENT)


def hashed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of each number of `x`, uint64, in place."""
    spare = np.empty_like(x)
    for shift, factor in _ROUNDS:
        np.right_shift(x, shift, out=spare)
        np.bitwise_xor(x, spare, out=x)
        np.multiply(x, factor, out=x)
    np.right_shift(x, _LAST_SHIFT, out=spare)
    return np.bitwise_xor(x, spare, out=x)


def word_steps(features: int) -> np.ndarray:
    """What meets the key of a line in each word of its elements, uint64 [features / 4]."""
    return np.arange(1, -(-features // ELEMENTS_PER_WORD) + 1, dtype=np.uint64) * _INCREMENT


def mixed(line_keys: np.ndarray, steps: np.ndarray, out: np.ndarray, spare: np.ndarray) -> None:
    """Fill `out`, uint64 [lines, words], with the numbers of the elements; `spare` is memory of the same shape."""
    (_, first), (_, second) = _ROUNDS
    # torch, for NumPy takes three times as long where numbers repeat along lines
    lines, of_words, numbers = (torch.from_numpy(array.view(np.int64)) for array in (line_keys, steps, out))
    torch.bitwise_xor(lines[:, None], of_words, out=numbers)
    np.multiply(out, first, out=out)
    np.right_shift(out, _HALF, out=spare)
    np.bitwise_xor(out, spare, out=out)
    np.multiply(out, second, out=out)


def quantised_drop(p: float) -> tuple[int, float]:
    """How many of 65536 equally likely numbers drop an element, and the factor of the kept elements.

    A probability above 0 drops at least one, and one below 1 keeps at least one.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a dropout probability lies between 0 and 1, not at {p}")
    if p in (0.0, 1.0):
        return int(p) * RESOLUTION, 1.0 - p
    threshold = min(max(round(p * RESOLUTION), 1), RESOLUTION - 1)
    return threshold, RESOLUTION / (RESOLUTION - threshold)


# A global, because autograd recomputes a checkpointed forward pass in a thread of its own on a GPU.
_current: MicrobatchDocuments | None = None


def current_documents() -> MicrobatchDocuments | None:
    """The documents of the microbatch that runs; None where nobody said."""
    return _current


def required_documents() -> MicrobatchDocuments:
    """The documents of the microbatch that runs, which somebody has to say."""
    assert _current is not None, "dropout needs the documents of the microbatch"
    return _current


def draw_document_keys(count: int) -> np.ndarray:
    """The keys of a row's `count` documents in a new call, uint64; numbered by their places where nobody said."""
    numbers = range(count) if _current is None else _current.numbers
    assert len(numbers) == count, "the documents of the row are those of the microbatch"
    return document_keys(draw_call_key(), numbers)


@contextlib.contextmanager
def known_documents(documents: MicrobatchDocuments) -> Iterator[None]:
    """Within it dropout knows its documents. Hold it around the forward and the backward pass."""
    global _current
    before, _current = _current, documents
    try:
        yield
    finally:
        _current = before
