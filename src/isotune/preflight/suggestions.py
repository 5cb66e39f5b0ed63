"""The smallest changes with which a run fits into memory, each with the memory that it then needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from isotune.config import RunRecipe
from isotune.io.errors import UserError
from isotune.preflight.request import FSDP, Launch, shipped_launch
from isotune.preflight.resources.memory import Memory


@dataclass(frozen=True)
class Suggestion:
    """A change as flags, the bytes that a process then needs, and whether the result stays the same to rounding."""

    change: str
    total: int
    same_result: bool


Variant = tuple[str, bool, RunRecipe, Launch]  # change, same_result, and the recipe and launch with the change


def find_suggestions(
    recipe: RunRecipe, launch: Launch, limit: int, estimate: Callable[[RunRecipe, Launch], Memory]
) -> list[Suggestion]:
    """Changes with which a process needs at most `limit` bytes; those that keep the result come first.

    Args:
        estimate: the memory of another recipe or launch.
    """
    suggestions = []
    for change, same_result, changed_recipe, changed_launch in _variants(recipe, launch):
        total = estimate(changed_recipe, changed_launch).total
        if total <= limit:
            suggestions.append(Suggestion(change, total, same_result))
    return sorted(suggestions, key=lambda suggestion: (not suggestion.same_result, -suggestion.total))


def _variants(recipe: RunRecipe, launch: Launch) -> Iterator[Variant]:
    smallest = recipe.max_seq_length
    halves = [recipe.microbatch_tokens // divisor for divisor in (2, 4)]
    sizes = [tokens for tokens in halves if tokens >= smallest]
    if halves[0] < smallest < recipe.microbatch_tokens:
        sizes.append(smallest)
    for tokens in sizes:
        yield from _variant(recipe, launch, microbatch_tokens=tokens)
    if not recipe.training_arguments.get("gradient_checkpointing"):
        yield from _variant(recipe, launch, gradient_checkpointing=True)
        if recipe.microbatch_tokens > smallest:
            yield from _variant(recipe, launch, gradient_checkpointing=True, microbatch_tokens=smallest)
    if launch.world_size > 1 and launch.engine != FSDP:
        for name in ("zero1", "zero2", "zero3", "zero3_offload"):
            sharded = shipped_launch(name, launch.world_size)
            if not sharded.offload and (launch.zero_stage or 0) >= (sharded.zero_stage or 0):
                continue
            file = f"--config_file {sharded.name}"
            yield file, True, recipe, sharded
            if sharded.zero_stage == 3:
                yield from _variant(recipe, sharded, prefix=f"{file} ", gradient_checkpointing=True)
    if recipe.tune == "full":
        yield from _variant(recipe, launch, same_result=False, tune="lora")
    if recipe.tune != "qlora":
        yield from _variant(recipe, launch, same_result=False, tune="qlora")
        yield from _variant(recipe, launch, same_result=False, tune="qlora", gradient_checkpointing=True)


def _variant(
    recipe: RunRecipe, launch: Launch, *, same_result: bool = True, prefix: str = "", **values: Any
) -> Iterator[Variant]:
    """The recipe with other values, unless they contradict another key."""
    flags = {key: "true" if value is True else value for key, value in values.items()}
    change = prefix + " ".join(f"--{key} {value}" for key, value in flags.items())
    try:
        yield change, same_result, recipe.with_values(**values), launch
    except UserError:
        return
