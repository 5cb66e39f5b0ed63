"""Markdown of texts that anybody may have written: names of folders, classes and data sets never become markup."""

import re
from collections.abc import Sequence

_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # which UTF-8 cannot encode
# an underscore within a word marks nothing; the last two begin links where a page makes links of addresses
_MARKUP = re.compile(r"[\\`*\[\]<>|&~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.I)


def inline(text: object) -> str:
    """A text within a line, in which no character is markup."""
    flat = _BLANK.sub(" ", _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", str(text))).strip()
    return _MARKUP.sub(r"\\\g<0>", flat)


def fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any run of backticks in it, so that nothing in it ends the block."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts whose first row is its header."""
    lines = [f"| {' | '.join(map(inline, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def python_text(text: str) -> str:
    """A text as a literal of Python, in double quotes where it needs no escapes in them."""
    return f'"{text}"' if text.isprintable() and not {'"', "\\"} & {*text} else ascii(text)
