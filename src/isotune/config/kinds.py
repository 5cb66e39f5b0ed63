"""Which kind of recipe a run had is seen from its values, so that no file has to say it.

The library knows two kinds, instruction tuning and classification. A project (isotune.projects) adds one of its own
through `register_project`: this is the one place where the library learns of what is built upon it.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isotune.config.recipes import ClassificationRecipe, Recipe


@dataclass(frozen=True)
class ProjectKind:
    """A kind of recipe that a project adds.

    Attributes:
        recipe: its class.
        own_key: a key that no other kind has; a recipe that says it is of this kind.
        prepare: reads and prepares a recipe's data, given the recipe and its tokenizer; returns the run's data.
        why_not_planned: the sentence that refuses to plan the values that a recipe gives, or None where it can be.
    """

    recipe: type[ClassificationRecipe]
    own_key: str
    prepare: Callable[[Any, Any], Any]
    why_not_planned: Callable[[Mapping[str, Any]], str | None]


_PROJECTS: list[ProjectKind] = []


def register_project(kind: ProjectKind) -> None:
    """Make a project's kind of recipe known."""
    _PROJECTS.append(kind)


def load_projects() -> None:
    """Let the projects register what they add: kinds of recipes, `builtin:` corpora, rules for labels."""
    importlib.import_module("isotune.projects")


def project_of(keys: Mapping[str, Any]) -> ProjectKind | None:
    """The project whose own key is among `keys`."""
    load_projects()
    return next((kind for kind in _PROJECTS if kind.own_key in keys), None)


def kind_of(values: Mapping[str, Any]) -> type[Recipe | ClassificationRecipe]:
    """The kind of recipe that resolved values belong to: only instruction tuning has rows to pack."""
    if "packing" in values:
        return Recipe
    project = project_of(values)
    return project.recipe if project else ClassificationRecipe
