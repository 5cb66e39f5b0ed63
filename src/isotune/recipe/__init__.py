"""What a user may say of a run, and what contradicts: the layer that everything else reads from."""

from isotune.recipe.kinds import kind_of
from isotune.recipe.recipes import ClassificationRecipe, Recipe, RunRecipe, read_recipe

__all__ = ["ClassificationRecipe", "Recipe", "RunRecipe", "kind_of", "read_recipe"]
