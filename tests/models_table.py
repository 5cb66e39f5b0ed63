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


def cells_of_lora(page: str) -> dict[str, tuple[str, str]]:
    """The columns LoRA and export of the page's table of any classifier, by type."""
    table = re.search(r"<!-- any classifier:.*?<!-- end -->", page, re.DOTALL)
    lines = re.findall(r"^\| `([\w.-]+)` \| ((?:packed|padded|alone) .*)$", table[0], re.MULTILINE) if table else []
    cells = {kind: [cell.strip() for cell in line.split("|")] for kind, line in lines}
    return {kind: (own[6], own[7]) for kind, own in cells.items() if len(own) > 8}


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


def entry(kind: str) -> str:
    """What the page says of a type: a row of the table, a refusal, or its name where no small model is built."""
    from isotune.io.errors import RunFault, UserError
    from tests.classifier_models import NotSmall, measure
    from tests.small_adapters import power_of_ten

    try:
        found = measure(kind)
    except (UserError, RunFault) as error:
        return f"- `{kind}`: {error}"
    except NotSmall:
        return f"`{kind}`"
    figures = map(power_of_ten, (found.leak, found.logits, found.loss, found.gradient))
    assert found.lora is not None
    cells = (f"`{kind}`", found.form, STATES[found.reads], *figures, *found.lora.cells, found.lora.why)
    return f"| {' | '.join(cells)} |"


def entries_of(block: str) -> dict[str, str]:
    """The entries of a table's part of the page, by type; names alone stand in its last line."""
    lines = re.findall(r"^(?:\| |- )`[^`]+`.*$", block, re.MULTILINE)
    return {text.split("`")[1]: text for text in [*lines, *re.findall(r"`[^`]+`", block.rstrip().splitlines()[-1])]}


def any_classifier(kinds: Sequence[str] = ()) -> str:
    """Every type that transformers has a classifier of, by what its tiny random model is measured to do.

    With `kinds` these alone are measured again.
    """
    from tests.classifier_models import KINDS

    before = re.search(r"(?s)<!-- any classifier: [^\n]*-->\n(.*?)<!-- end -->", PAGE.read_text())
    entries = entries_of(before[1]) if kinds and before else {}
    for kind in kinds or KINDS:
        entries[kind] = entry(kind)
        print(entries[kind], file=sys.stderr, flush=True)
    return text_of(entries)


def text_of(entries: dict[str, str]) -> str:
    """The part of the page that holds these entries."""
    ordered = [entries[kind] for kind in sorted(entries)]
    rows, refused, not_small = ([text for text in ordered if text[0] == first] for first in "|-`")
    forms = [row.split(" | ")[1] for row in rows]
    counts = ", ".join(f"{forms.count(form)} {form}" for form in ("packed", "padded", "alone"))
    head = (
        f"transformers {transformers.__version__}: {len(rows)} types train ({counts}), {len(refused)} are refused, "
        f"and {len(not_small)} do not build from a small configuration."
    )
    titles = ("type", "texts", "its head reads", "leak", "logits", "loss", "gradient", "LoRA", "export", "why refused")
    last = f"Not built from a small configuration: {', '.join(not_small)}."
    return "\n".join([head, "", table(titles, []) + "\n".join(rows), "", "Refused:", "", *refused, "", last, ""])


if __name__ == "__main__":  # with names of types, these classifiers alone are measured again
    transformers.logging.set_verbosity_error()
    if not sys.argv[1:]:
        PAGE.write_text(replaced_table(PAGE.read_text(), "classifiers", classifiers()))
    written = any_classifier(sys.argv[1:])
    PAGE.write_text(replaced_table(PAGE.read_text(), "any classifier", written))
