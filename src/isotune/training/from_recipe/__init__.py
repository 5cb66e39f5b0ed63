"""From a recipe to a trainer with its parts: the functions that the launch scripts call in order."""
