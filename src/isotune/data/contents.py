"""What a text says, however it is written: undoes HTML and escapes, and decides when two texts are the same.

Random choices here depend on a text's content and the seed, never on where the text stands or what stands near it.
Rows may be shuffled, added or removed, and no other row changes its side of a split or its random label; two rows of
the same text always share theirs.
"""

import ast
import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

# purposes; the random numbers of one are independent of the others'
HELD_OUT, COIN, AUGMENTED = "held out", "coin", "augmented"

_MARKS = re.compile(
    r"""(?i:<br\s*/?>)
    | \\(?:[nrt\\]|"{1,2})
    | &(?:\#\d{1,7}|\#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});""",
    re.X,
)
_ESCAPES = {"n": "\n", "r": "", "t": "\t", '"': '"', "\\": "\\"}


def clean(text: str) -> str:
    """The text with HTML breaks (IMDb), HTML entities and backslash escapes (Yelp) undone, once, from left to right.

    Any other backslash or angle bracket is left alone; docs/classification.md lists what each mark becomes.
    """
    return _MARKS.sub(lambda mark: _meaning(mark[0]), text) if "<" in text or "\\" in text or "&" in text else text


def _meaning(mark: str) -> str:
    if mark[0] == "<":
        return "\n"
    return html.unescape(mark) if mark[0] == "&" else _ESCAPES[mark[1]]


def written_list(text: Any) -> list[Any] | None:
    """The list that a text writes out, as JSON or as Python does; None where it writes none, or is no text."""
    if not isinstance(text, str) or not (text.lstrip()[:1] == "[" and text.rstrip()[-1:] == "]"):
        return None
    try:
        found = json.loads(text)
    except RecursionError:
        return None
    except ValueError:
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return cast("list[Any]", found) if isinstance(found, list) else None


def normalised(text: str) -> str:
    """The text as it is compared: cleaned, in Unicode's form NFKC, without case, its white space single blanks."""
    text = clean(text)
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def content_digest(normalised_text: str) -> int:
    """64 bits that stand for a normalised text; two different ones share them once in 10^19 pairs."""
    return int.from_bytes(hashlib.blake2b(normalised_text.encode(), digest_size=8).digest(), "little")


EMPTY = np.uint64(content_digest(""))


def contents_of(texts: Sequence[str]) -> np.ndarray:
    """What each text says, as uint64 [texts]: equal for two spellings of one text."""
    return np.array([content_digest(normalised(text)) for text in texts], np.uint64)


def hash_uniform(purpose: str, seed: int, contents: np.ndarray) -> np.ndarray:
    """A number from 0 to below 1 for each content, uint64 [documents]: float64 [documents], uniform and independent."""
    key = f"{purpose} {seed} ".encode()
    words = (content.to_bytes(8, "little") for content in contents.tolist())
    digests = b"".join(hashlib.blake2b(key + word, digest_size=8).digest() for word in words)
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53


def uniform_stream(purpose: str, seed: int, epoch: int, content: int, count: int) -> np.ndarray:
    """`count` numbers from 0 to below 1 of one content in one epoch: float64 [count], uniform and independent.

    The first of them are the same however many are asked for.
    """
    key = f"{purpose} {seed} {epoch} ".encode() + content.to_bytes(8, "little")
    return (np.frombuffer(hashlib.shake_256(key).digest(8 * count), "<u8") >> np.uint64(11)) * 2.0**-53


def random_labels(seed: int, contents: np.ndarray) -> np.ndarray:
    """A class, 0 or 1, for each document: int32 [documents]. Nothing that is learned from texts predicts it."""
    return (hash_uniform(COIN, seed, contents) < 0.5).astype(np.int32)


def held_out(share: float, seed: int, contents: np.ndarray, purpose: str = HELD_OUT) -> np.ndarray:
    """Which documents are kept for evaluation, or another purpose: bool [documents], each with probability `share`."""
    return hash_uniform(purpose, seed, contents) < share
