"""The class of recipe that belongs to a task, and the projects that add a class of their own.

A recipe names its task by the key `task`. A recipe of an earlier version does not, and is known by its keys.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isotune.config.recipes import ClassificationRecipe, Recipe

TASKS: dict[str, type[Recipe | ClassificationRecipe]] = {"sft": Recipe, "classification": ClassificationRecipe}


@dataclass(frozen=True)
class ProjectKind:
    """A kind of recipe that a project adds.

    Attributes:
        recipe: its class.
        own_key: a key that no other kind has; a recipe that has it is of this kind.
        prepare: reads and prepares a recipe's data, given the recipe and its tokenizer; returns the run's data.
        why_not_planned: the sentence that refuses to plan the values that a recipe gives, or None where it can be.
    """

    recipe: type[ClassificationRecipe]
    own_key: str
    prepare: Callable[[Any, Any], Any]
    why_not_planned: Callable[[Mapping[str, Any]], str | None]


_PROJECTS: list[ProjectKind] = []


def register_project(kind: ProjectKind) -> None:
    """Make a project's kind of recipe known to the library."""
    _PROJECTS.append(kind)


def load_projects() -> None:
    """Let the projects register what they add: kinds of recipes, `builtin:` corpora, rules for labels."""
    importlib.import_module("isotune.projects")


def project_of(keys: Mapping[str, Any]) -> ProjectKind | None:
    """The project whose own key is among `keys`."""
    load_projects()
    return next((kind for kind in _PROJECTS if kind.own_key in keys), None)


def task_of(given: Mapping[str, Any]) -> str | None:
    """The task that given values name, or whose own keys are among them; None where they leave it open."""
    if "task" in given:
        return given["task"]
    keys = {task: recipe.keys().keys() for task, recipe in TASKS.items()}
    own = {"sft": keys["sft"] - keys["classification"], "classification": keys["classification"] - keys["sft"]}
    named = [task for task, names in own.items() if names & given.keys()]
    return named[0] if len(named) == 1 else None


def kind_of(values: Mapping[str, Any]) -> type[Recipe | ClassificationRecipe]:
    """The class of the recipe that resolved values belong to."""
    if task_of(values) == "sft":
        return Recipe
    project = project_of(values)
    return project.recipe if project else ClassificationRecipe
