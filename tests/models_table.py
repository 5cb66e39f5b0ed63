"""Writes the table of classifiers in docs/models.md from measurements: `python -m tests.models_table`, in minutes.

A table stands between `<!-- NAME: ... -->` and `<!-- end -->` in the page.
"""

import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
STATES = {"first": "the first token", "last": "the last token", "all": "all tokens"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def replaced_table(page: str, name: str, text: str) -> str:
    """The page with another table `name`."""
    found, count = re.subn(rf"(?s)(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", lambda m: m[1] + text + m[2], page)
    assert count == 1, f"{PAGE} has no table '{name}'"
    return found


def classifiers() -> str:
    """Every family of tests/classifier_families.py, with the layout that its tiny random model is measured right in."""
    from isotune.models.classifier import install_classification
    from tests.classifier_families import FAMILIES

    rows = []
    for family in FAMILIES:
        layout = install_classification(family.build())
        reason = layout.reason.split("; padding: ")[-1] if layout.name == "alone" else layout.reason
        reason = re.sub(r" by [0-9.e+-]+ of their spread", "", reason)
        rows.append([family.name, f"`{family.kind}`", layout.name, STATES[layout.reads], reason])
    return table(("family", "model type", "texts", "its head reads", "why not packed, or not padded"), rows)


if __name__ == "__main__":
    PAGE.write_text(replaced_table(PAGE.read_text(), "classifiers", classifiers()))
