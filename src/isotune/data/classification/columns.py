"""Finds the columns of texts and classes where a recipe names none and the data have other names than the usual ones.

A guess is said, and recorded in recipe.yaml. Where two columns would do, or none, the recipe has to name it.
"""

from itertools import islice
from typing import Any

from isotune.config import ClassificationRecipe
from isotune.data.classification.classes import MOST_CLASSES, label_of
from isotune.data.sources.csv_rows import looks_like_row
from isotune.data.sources.source import Source
from isotune.io.errors import UserError

TEXT, LABEL = "dataset_text_field", "dataset_label_field"
MEANING = {TEXT: "texts", LABEL: "classes"}

ROWS_LOOKED_AT = 1_000
LONGEST_NAME = 60  # characters of a class
WORDS_OF_A_TEXT = 2  # on average


def find_columns(source: Source, recipe: ClassificationRecipe) -> dict[str, str]:
    """The columns that the data must have been meant to have, by the recipe's key; nothing where the usual ones do.

    Only keys that the recipe leaves open are looked for. UserError where several columns would do, or none.
    """
    keys = [TEXT, LABEL] if recipe.label_source == "column" else [TEXT]
    left_open = [key for key in keys if key not in recipe.given]
    if not left_open:
        return {}
    rows = list(islice(source.rows(), ROWS_LOOKED_AT))
    wanted = [key for key in left_open if getattr(recipe, key) not in rows[0]]
    if not wanted:
        return {}
    if source.names_by_line and looks_like_row(list(rows[0])):  # a file without a line of names
        raise source.lacks(0, rows[0], getattr(recipe, wanted[0]), wanted[0])
    taken = {getattr(recipe, key) for key in keys if key not in wanted}
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in taken}
    fits = {
        LABEL: [name for name, cells in columns.items() if _are_classes(cells)],
        TEXT: [name for name, cells in columns.items() if _are_texts(cells)],
    }
    fits[TEXT] = [name for name in fits[TEXT] if name not in fits[LABEL]]
    found: dict[str, str] = {}
    for key in wanted:
        if len(fits[key]) == 1:
            found[key] = fits[key][0]
            continue
        if not fits[key]:
            raise source.lacks(0, rows[0], getattr(recipe, key), key)
        several = " and ".join(map(repr, fits[key]))
        raise UserError(
            f"{source.name} has no column {getattr(recipe, key)!r}, and {several} could hold its {MEANING[key]}: say "
            f"which by --{key}"
        )
    return found


def said(found: dict[str, str]) -> str:
    """The line that says which columns were found."""
    columns = " and ".join(f"the {MEANING[key]} from the column {name!r}" for key, name in found.items())
    return f"nobody said so, and nothing else fits: {columns} ({', '.join(found)} would say otherwise)"


def _are_texts(cells: list[Any]) -> bool:
    texts = [cell for cell in cells if isinstance(cell, str)]
    words = sum(len(text.split()) for text in texts)
    return len(texts) == len(cells) and words >= WORDS_OF_A_TEXT * len(texts) and len(set(texts)) > 1


def _are_classes(cells: list[Any]) -> bool:
    """Whether cells are labels, and few enough of them differ."""
    try:
        labels = [label_of(cell) for cell in cells]
    except ValueError:
        return False
    distinct = {str(label) for label in labels}
    few = 2 <= len(distinct) <= max(2, min(len(cells) // 2, MOST_CLASSES))
    return few and max(map(len, distinct)) <= LONGEST_NAME
