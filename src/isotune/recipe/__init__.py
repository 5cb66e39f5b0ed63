"""What a user may say of a run, and what contradicts: the layer that everything else reads from."""

from isotune.recipe.recipes import ClassificationRecipe, Recipe, RunRecipe, kind_of, read_recipe

__all__ = ["ClassificationRecipe", "Recipe", "RunRecipe", "kind_of", "read_recipe"]
