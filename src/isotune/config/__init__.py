"""What a user may say of a run, and what contradicts: the layer that everything else reads from."""

from isotune.config.recipes import ClassificationRecipe, Recipe, kind_of, read_recipe
from isotune.config.run_recipe import RunRecipe

__all__ = ["ClassificationRecipe", "Recipe", "RunRecipe", "kind_of", "read_recipe"]
