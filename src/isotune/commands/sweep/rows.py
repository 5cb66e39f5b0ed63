"""The three sets of rows of a sweep: a trial trains on some and is chosen by others; a third tests the winner.

The winner of many trials is the luckiest of them too. Only rows that no trial has seen show what it is worth.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.config import RunRecipe
from isotune.config.command_line import CommandLine
from isotune.config.engine_keys import evaluates
from isotune.config.layers import Layer
from isotune.config.mixture import NAME
from isotune.config.recipes import ClassificationRecipe
from isotune.config.schema import Values
from isotune.io.errors import UserError
from isotune.io.formats import format_of

SELECTION_SHARE = 0.1  # of the training rows, where the recipe's own evaluation data are the test rows


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that the search never sees, as keys of an evaluation task."""

    keys: dict[str, Any]

    @property
    def in_words(self) -> str:
        """`builtin:opinions (test)`."""
        return f"{self.keys['dataset_name']} ({self.keys['dataset_split']})"


def choose_rows(
    what: str, kind: type[RunRecipe], of_file: Layer, flags: CommandLine, test_rows: tuple[str, str] | None
) -> tuple[RunRecipe, HeldOutRows]:
    """The recipe of the trials, which evaluates on rows to choose by, and the test rows.

    `test_rows` are name and split of a data set; None: of a classifier the evaluation data of its recipe. UserError
    where there is nothing to choose by or to test on, or both are the same.
    """
    recipe = kind.from_layers([of_file, *flags.layers(kind.keys())])
    if not evaluates(recipe.values):
        raise UserError(
            f"{what}: there is no evaluation data to choose by: say --eval_dataset_name"
            f"{', or --eval_split_share' if kind is ClassificationRecipe else ''}, and no --eval_strategy no"
        )
    if test_rows is not None:
        name, split = test_rows
        of_hub = _of_hub(recipe.values, "") if name == recipe.values["dataset_name"] else {}
    else:
        words = dict(flags.flags)
        share = words.pop("eval_split_share", [str(SELECTION_SHARE)])
        own = kind.from_layers([of_file, *CommandLine(None, words).layers(kind.keys())])
        name, split = own.values["eval_dataset_name"], own.values["eval_dataset_split"]
        if kind is not ClassificationRecipe or name is None or own.values["eval_dataset_mixture"] is not None:
            raise UserError(
                f"{what}: no rows are left that the search does not see: name test rows by --test_dataset_name"
            )
        of_hub = _of_hub(own.values, "eval_")
        recipe = own.with_values(eval_split_share=share[0])
    for prefix, role in (("", "trains on"), ("eval_", "chooses by")):
        if any(_same(name, seen) and (split == part or format_of(name)) for seen, part in _seen(recipe.values, prefix)):
            raise UserError(f"the search {role} {name} ({split}), and the test needs other rows: --test_dataset_name")
    return recipe, HeldOutRows({"dataset_name": name, "dataset_split": split, **of_hub})


def _same(name: str, seen: str | None) -> bool:
    """Whether two names are one file, folder or Hub id."""
    if seen is None or name == seen:
        return name == seen
    places = [Path(each).expanduser() for each in (name, seen)]
    return all(place.exists() for place in places) and places[0].samefile(places[1])


def _seen(values: Values, prefix: str) -> list[tuple[str | None, str]]:
    """Name and split of each data set that a recipe reads."""
    split = values[f"{prefix}dataset_split"]
    mixture = values[f"{prefix}dataset_mixture"]
    if mixture is not None:
        return [(entry[NAME], entry.get("dataset_split", split)) for entry in mixture]
    return [(values[f"{prefix}dataset_name"], split)]


def _of_hub(values: Values, prefix: str) -> dict[str, Any]:
    """Configuration and revision of a data set of the recipe, as keys of a task."""
    names = ("config", "revision")
    return {f"dataset_{name}": value for name in names if (value := values[f"{prefix}dataset_{name}"]) is not None}
