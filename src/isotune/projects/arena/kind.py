"""What the library has to know of the Arena: its kind of recipe, and how its data are prepared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isotune.config.recipes import PROJECTS, ProjectKind
from isotune.data.documents import RunData
from isotune.projects.arena.recipes import ArenaRecipe


def _prepare(recipe: ArenaRecipe, tokenizer: Any) -> RunData:
    from isotune.projects.arena.battles import read_competition
    from isotune.projects.arena.documents import prepare_competition

    return prepare_competition(read_competition(Path(recipe.dataset_name)), recipe, tokenizer)[0]


def _why_not_planned(given: Mapping[str, Any]) -> str | None:
    if given["method"] == "baselines":
        return "method: baselines trains no network, so there is no launch and no memory to plan"
    return None


PROJECTS.append(ProjectKind(ArenaRecipe, "method", _prepare, _why_not_planned))
