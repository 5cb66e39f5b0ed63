"""Random choices that depend on a text's content and the seed, never on where the text stands or what stands near it.

Rows may then be shuffled, added or removed, and no other row changes its side of a split or its random label; two
rows of the same text always share theirs.
"""

import hashlib

import numpy as np

HELD_OUT, COIN = "held out", "coin"  # purposes; the numbers of one are independent of the other's


def hash_uniform(purpose: str, seed: int, contents: np.ndarray) -> np.ndarray:
    """A number from 0 to below 1 for each content: float64 [documents], uniform, independent between contents.

    Args:
        contents: uint64 [documents], of `isotune.data.clean_text.content_digest`.
    """
    key = f"{purpose} {seed} ".encode()
    words = (content.to_bytes(8, "little") for content in contents.tolist())
    digests = b"".join(hashlib.blake2b(key + word, digest_size=8).digest() for word in words)
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53


def random_labels(seed: int, contents: np.ndarray) -> np.ndarray:
    """A class, 0 or 1, for each document: int32 [documents]. Nothing that is learned from texts predicts it."""
    return (hash_uniform(COIN, seed, contents) < 0.5).astype(np.int32)


def held_out(share: float, seed: int, contents: np.ndarray) -> np.ndarray:
    """Which documents are kept for evaluation: bool [documents], each with the probability `share`."""
    return hash_uniform(HELD_OUT, seed, contents) < share
