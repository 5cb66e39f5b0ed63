"""What a plan is asked for: a recipe and a launch, read to the end even where they are wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.config.engine_keys import ALIASES
from isotune.config.kinds import project_of
from isotune.config.layers import Layer
from isotune.config.recipe_file import read_file
from isotune.io.errors import UserError
from isotune.models.opening import load_config
from isotune.models.supervised_loss import PLAIN_HEADS
from isotune.preflight.launches import Launch, read_launch

KINDS: tuple[type[RunRecipe], ...] = (Recipe, ClassificationRecipe)


@dataclass(frozen=True)
class Asked:
    """A recipe and its launch, and every mistake that was found in them, each a sentence."""

    recipe: RunRecipe
    launch: Launch
    problems: tuple[str, ...]


def read_asked(
    config: Path | None, flags: Sequence[str], accelerate_config: str | None, world_size: int | None
) -> Asked:
    """Read a recipe file, flags over it, and a launch configuration.

    Args:
        config: the recipe file; None is flags alone.
        flags: words such as `--learning_rate 1e-4`.
        accelerate_config, world_size: see `isotune.preflight.launches.read_launch`.

    Raises:
        UserError: a file that cannot be read as what it is, flags without values, or no process.
    """
    if world_size is not None and world_size < 1:
        raise UserError(f"--world_size is {world_size}: a launch has at least one process")
    layers = [read_file(config)] if config is not None else []
    layers.append(_flags(flags))
    problems: list[str] = []
    recipe = _read(layers, problems)
    launch = read_launch(accelerate_config, world_size, recipe, problems.append)
    return Asked(recipe, launch, tuple(problems))


def _read(layers: Sequence[Layer], problems: list[str]) -> RunRecipe:
    """The recipe as the kind that knows most of its keys; its model decides between kinds that know as many.

    A project's recipes are known by the key that they alone have.
    """
    given = {ALIASES.get(name, name): value for layer in layers for name, value in layer.given.items()}
    if project := project_of(given):
        if why_not := project.why_not_planned(given):
            raise UserError(why_not)
        return project.recipe.from_layers(layers, problems.append)
    written = set(given)
    unknown = {kind: len(written - kind.keys().keys()) for kind in KINDS}
    kinds = [kind for kind in KINDS if unknown[kind] == min(unknown.values())]
    for kind in kinds:
        found: list[str] = []
        recipe = kind.from_layers(layers, found.append)
        if kind is kinds[-1] or _suits(recipe):
            problems += found
            return recipe
    raise AssertionError("there is a last kind")


def _suits(recipe: RunRecipe) -> bool:
    """Whether the recipe's model writes text, as instruction tuning needs; a name that leads nowhere may."""
    try:
        return load_config(replace(recipe, max_seq_length=1)).model_type in PLAIN_HEADS
    except UserError:
        return True


def _flags(words: Sequence[str]) -> Layer:
    given: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} belongs to no flag: write --KEY VALUE")
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        given[name.replace("-", "_")] = " ".join(values) if values else "true"
    return Layer(given, flags=True)
