"""Undoes HTML and escapes in texts, and decides when two texts are the same.

`clean` replaces what real data sets leave in their texts, in one pass from left to right:

    <br>  <br/>  <br />      a line end         (IMDb)
    \\n  \\r  \\t               a line end, nothing, a tab: two characters in the file, as in Yelp
    \\"  \\""                  "
    \\\\                       \\
    &amp;  &#39;  &quot; ...  the character that HTML means by it

Any other backslash or angle bracket is left alone.
"""

import hashlib
import html
import re
import unicodedata

_MARKS = re.compile(
    r"""(?i:<br\s*/?>)
    | \\(?:[nrt\\]|"{1,2})
    | &(?:\#\d{1,7}|\#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});""",
    re.X,
)
_ESCAPES = {"n": "\n", "r": "", "t": "\t", '"': '"', "\\": "\\"}


def clean(text: str) -> str:
    """The text with HTML breaks, HTML entities and backslash escapes undone."""
    return _MARKS.sub(lambda mark: _meaning(mark[0]), text) if "<" in text or "\\" in text or "&" in text else text


def _meaning(mark: str) -> str:
    if mark[0] == "<":
        return "\n"
    return html.unescape(mark) if mark[0] == "&" else _ESCAPES[mark[1]]


def normalised(text: str) -> str:
    """The text as it is compared: cleaned, in Unicode's form NFKC, without case, its white space single blanks."""
    text = clean(text)
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def content_digest(normalised_text: str) -> int:
    """64 bits that stand for a normalised text; two different ones share them once in 10^19 pairs."""
    return int.from_bytes(hashlib.blake2b(normalised_text.encode(), digest_size=8).digest(), "little")


EMPTY = content_digest("")
