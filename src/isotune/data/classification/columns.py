"""Finds the columns of texts and classes where a recipe names none and the data have other names than the usual ones.

A guess is said, and recorded in recipe.yaml. Where two columns would do, or none, the recipe has to name it.
"""

from itertools import islice
from typing import Any

from isotune.config import ClassificationRecipe
from isotune.config.recipes import AUTO
from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.data.class_index import label_of
from isotune.data.classification.classes import MOST_CLASSES
from isotune.data.classification.pairs import known_pairs
from isotune.data.classification.targets import are_numbers, is_bit, type_of
from isotune.data.sources.class_labels import fold
from isotune.data.sources.csv_rows import looks_like_row
from isotune.data.sources.source import Source
from isotune.io.errors import UserError

TEXT, PAIR, LABEL = "dataset_text_field", "dataset_text_pair_field", "dataset_label_field"
MEANING = {TEXT: "texts", PAIR: "second texts", LABEL: "classes"}

LABEL_COLUMNS = 3  # of 0 and 1 are labels of one text where nobody says so; two could be two different questions
ROWS_LOOKED_AT = 1_000
LONGEST_NAME = 60  # characters of a class
SENTENCE_ENDS = tuple(".!?")
WORDS_OF_A_TEXT = 2  # on average


def find_columns(source: Source, recipe: ClassificationRecipe) -> dict[str, Any]:
    """The columns that the data must have been meant to have, by the recipe's key; nothing where the usual ones do.

    Only keys that the recipe leaves open are looked for. UserError where several columns would do, or none.
    """
    keys = [TEXT, LABEL] if recipe.label_source == "column" else [TEXT]
    left_open = [key for key in keys if key not in recipe.given]
    if not left_open:
        return {}
    rows = list(islice(source.rows(), ROWS_LOOKED_AT))
    found = _pair(source, rows, recipe) if TEXT in left_open and recipe.label_source == "column" else {}
    if LABEL in left_open and _has_label_columns(rows[0], recipe):
        left_open.remove(LABEL)
    wanted = [key for key in left_open if key not in found and getattr(recipe, key) not in rows[0]]
    if not wanted:
        return found
    if source.names_by_line and looks_like_row(list(rows[0])):  # a file without a line of names
        raise source.lacks(0, rows[0], getattr(recipe, wanted[0]), wanted[0])
    taken = {getattr(recipe, key) for key in keys if key not in wanted} | {recipe.dataset_text_pair_field}
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in taken | {*found.values()}}
    fits = {
        LABEL: _label_columns(columns, recipe.task_type),
        TEXT: [name for name, cells in columns.items() if _are_texts(cells)],
    }
    fits[TEXT] = [name for name in fits[TEXT] if name not in fits[LABEL]]
    for key in wanted:
        if len(fits[key]) == 1:
            found[key] = fits[key][0]
            continue
        if not fits[key]:
            raise source.lacks(0, rows[0], getattr(recipe, key), key)
        bits = [name for name, cells in columns.items() if all(map(is_bit, cells))]
        if key == LABEL and {*fits[key]} <= {*bits} and _are_of_one_text(len(bits), recipe.task_type):
            found |= {"task_type": MULTI_LABEL, "label_names": bits}
            continue
        several = " and ".join(map(repr, fits[key]))
        both = f", or both by --{TEXT} and --{PAIR}" if key == TEXT and len(fits[key]) == 2 else ""
        raise UserError(
            f"{source.name} has no column {getattr(recipe, key)!r}, and {several} could hold its {MEANING[key]}: say "
            f"which by --{key}{both}"
        )
    label, text = found.get(LABEL), found.get(TEXT)
    if source.names_by_line and label is not None and text is not None and _is_row(label, columns[label], text):
        raise source.unnamed(list(rows[0]))
    return found


def said(found: dict[str, Any]) -> str:
    """The line that says which columns were found."""
    columns = [f"the {MEANING[key]} from the column {name!r}" for key, name in found.items() if key in MEANING]
    if "label_names" in found:
        columns.append(f"the labels from the columns of 0 and 1 {', '.join(found['label_names'])}")
    keys = ", ".join(found)
    return f"nobody said so, and nothing else fits: {' and '.join(columns)} ({keys} would say otherwise)"


def _pair(source: Source, rows: list[dict[str, Any]], recipe: ClassificationRecipe) -> dict[str, Any]:
    """The columns of two texts, where their names can only mean a pair; UserError where several pairs do."""
    if PAIR in recipe.given:
        return {}
    pairs = [pair for pair in known_pairs(rows[0]) if all(isinstance(row.get(n), str) for row in rows for n in pair)]
    if recipe.dataset_text_field in rows[0]:  # the usual column counts, beside the second text of its own name only
        pairs = [pair for pair in pairs if pair[0] == recipe.dataset_text_field]
    if len(pairs) > 1:
        several = " or ".join(f"{one!r} and {two!r}" for one, two in pairs)
        raise UserError(
            f"{source.name} has the columns {several}, which could be its pairs: say which by --{TEXT} and --{PAIR}"
        )
    return {key: name for pair in pairs for key, name in zip((TEXT, PAIR), pair, strict=True)}


def _has_label_columns(row: dict[str, Any], recipe: ClassificationRecipe) -> bool:
    """Whether the recipe names the labels, and the row has columns of these names."""
    names = recipe.label_names if recipe.task_type == MULTI_LABEL else None
    return bool(names) and getattr(recipe, LABEL) not in row and any(name in row for name in names or ())


def _are_of_one_text(columns: int, task_type: str) -> bool:
    return task_type == MULTI_LABEL or (task_type == AUTO and columns >= LABEL_COLUMNS)


def _is_row(label: str, cells: list[Any], text: str) -> bool:
    """Whether the line of names is a row: a class where their column is named, and words where texts are."""
    is_text = len(text.split()) > 1 or text.strip()[-1:] in SENTENCE_ENDS
    return is_text and fold(label) in {fold(cell) for cell in cells}


def _are_texts(cells: list[Any]) -> bool:
    texts = [cell for cell in cells if isinstance(cell, str)]
    words = sum(len(text.split()) for text in texts)
    return len(texts) == len(cells) and words >= WORDS_OF_A_TEXT * len(texts) and len(set(texts)) > 1


def _label_columns(columns: dict[str, list[Any]], task_type: str) -> list[str]:
    """The columns whose cells texts of this kind are labelled with; classes first, where the kind is open."""
    shows = {name: type_of(cells) for name, cells in columns.items()}
    if task_type == REGRESSION:
        return [name for name, cells in columns.items() if are_numbers(cells) and len({*map(str, cells)}) > 1]
    classes = [name for name, cells in columns.items() if shows[name] == SINGLE_LABEL and _are_classes(cells)]
    if task_type == SINGLE_LABEL or (classes and task_type == AUTO):
        return classes
    others = [name for name, kind in shows.items() if kind != SINGLE_LABEL and task_type in (AUTO, kind)]
    return others or classes


def _are_classes(cells: list[Any]) -> bool:
    """Whether cells are labels, and few enough of them differ."""
    try:
        labels = [label_of(cell) for cell in cells]
    except ValueError:
        return False
    distinct = {str(label) for label in labels}
    few = 2 <= len(distinct) <= max(2, min(len(cells) // 2, MOST_CLASSES))
    return few and max(map(len, distinct)) <= LONGEST_NAME
