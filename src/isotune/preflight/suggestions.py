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


def find_suggestions(
    recipe: RunRecipe, launch: Launch, limit: int, estimate: Callable[[RunRecipe, Launch], Memory]
) -> list[Suggestion]:
    """Changes with which a process needs at most `limit` bytes; those that keep the result come first.

    `estimate` gives the memory of another recipe or launch.
    """
    suggestions = []
    for other, values in _changes(recipe, launch):
        try:
            changed = recipe.with_values(**values) if values else recipe
        except UserError:  # the values contradict another key
            continue
        total = estimate(changed, other).total
        if total <= limit:
            flags = [f"--{key} {'true' if value is True else value}" for key, value in values.items()]
            file = [] if other is launch else [f"--config_file {other.name}"]
            suggestions.append(Suggestion(" ".join([*file, *flags]), total, same_result="tune" not in values))
    return sorted(suggestions, key=lambda suggestion: (not suggestion.same_result, -suggestion.total))


def _changes(recipe: RunRecipe, launch: Launch) -> Iterator[tuple[Launch, dict[str, Any]]]:
    """A launch and values of the recipe for each change; all but those of `tune` keep the result."""
    smallest = recipe.max_seq_length
    halves = [recipe.microbatch_tokens // divisor for divisor in (2, 4)]
    sizes = [tokens for tokens in halves if tokens >= smallest]
    if halves[0] < smallest < recipe.microbatch_tokens:
        sizes.append(smallest)
    yield from ((launch, {"microbatch_tokens": tokens}) for tokens in sizes)
    if not recipe.training_arguments.get("gradient_checkpointing"):
        yield launch, {"gradient_checkpointing": True}
        if recipe.microbatch_tokens > smallest:
            yield launch, {"gradient_checkpointing": True, "microbatch_tokens": smallest}
    if launch.world_size > 1 and launch.engine != FSDP:
        for name in ("zero1", "zero2", "zero3", "zero3_offload"):
            sharded = shipped_launch(name, launch.world_size)
            if sharded.offload or (launch.zero_stage or 0) < (sharded.zero_stage or 0):
                yield sharded, {}
                if sharded.zero_stage == 3:
                    yield sharded, {"gradient_checkpointing": True}
    if recipe.tune == "full":
        yield launch, {"tune": "lora"}
    if recipe.tune != "qlora":
        yield launch, {"tune": "qlora"}
        yield launch, {"tune": "qlora", "gradient_checkpointing": True}
