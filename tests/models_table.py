"""Writes the tables of classifiers in docs/models.md from measurements: `python -m tests.models_table`, in minutes.

A table stands between `<!-- NAME: ... -->` and `<!-- end -->` in the page.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers

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


def trained_classifiers(page: str) -> dict[str, str]:
    """The types of the page's table of any classifier that train, with how their texts run."""
    table = re.search(r"<!-- any classifier:.*?<!-- end -->", page, re.DOTALL)
    return dict(re.findall(r"^\| `([\w.-]+)` \| (packed|padded|alone) ", table[0], re.MULTILINE)) if table else {}


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


def any_classifier() -> str:
    """Every type that transformers has a classifier of, by what its tiny random model is measured to do."""
    from isotune.io.errors import RunFault, UserError
    from tests.classifier_models import KINDS, Measured, NotSmall, measure

    found: list[Measured] = []
    refused, not_small = list[str](), list[str]()
    for kind in KINDS:
        try:
            found.append(measure(kind))
        except (UserError, RunFault) as error:
            refused.append(f"- `{kind}`: {error}")
        except NotSmall:
            not_small.append(f"`{kind}`")
        print(kind, file=sys.stderr, flush=True)
    counts = ", ".join(f"{sum(m.form == form for m in found)} {form}" for form in ("packed", "padded", "alone"))
    head = (
        f"transformers {transformers.__version__}: {len(found)} types train ({counts}), {len(refused)} are refused, "
        f"and {len(not_small)} do not build from a small configuration."
    )
    rows = [
        [f"`{m.kind}`", m.form, STATES[m.reads], *(f"{x:.0e}" if x else "0" for x in (m.logits, m.loss, m.gradient))]
        for m in found
    ]
    titles = ("type", "texts", "its head reads", "logits", "loss", "gradient")
    last = f"Not built from a small configuration: {', '.join(not_small)}."
    return "\n".join([head, "", table(titles, rows), "Refused:", "", *refused, "", last, ""])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for name, write in (("classifiers", classifiers), ("any classifier", any_classifier)):
        written = write()
        PAGE.write_text(replaced_table(PAGE.read_text(), name, written))
