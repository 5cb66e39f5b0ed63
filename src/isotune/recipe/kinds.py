"""Which kind of recipe a run had is seen from its values, so that no file has to say it."""

from collections.abc import Mapping
from typing import Any

from isotune.recipe.arena_recipes import ArenaRecipe
from isotune.recipe.recipes import ClassificationRecipe, Recipe


def kind_of(values: Mapping[str, Any]) -> type[Recipe | ClassificationRecipe]:
    """The kind of recipe that resolved values belong to: only instruction tuning has rows to pack."""
    if "packing" in values:
        return Recipe
    return ArenaRecipe if "train_orders" in values else ClassificationRecipe
