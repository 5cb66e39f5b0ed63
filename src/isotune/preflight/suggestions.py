"""The smallest changes that make a run fit, each with the memory that it would then need."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from isotune.config import RunRecipe
from isotune.io.errors import UserError
from isotune.preflight.launches import DEEPSPEED, FSDP, Launch
from isotune.preflight.resources.memory import Memory

_HALVES = (2, 4)


@dataclass(frozen=True)
class Suggestion:
    """A change, in the words of flags, and the bytes that it leads to; `same_result` to rounding or not."""

    change: str
    total: int
    same_result: bool


def find_remedies(
    recipe: RunRecipe, launch: Launch, limit: int, plan: Callable[[RunRecipe, Launch], Memory]
) -> list[Suggestion]:
    """Changes after which a process needs at most `limit` bytes, those that leave the result alone first.

    Args:
        plan: the memory of another recipe or launch.
    """
    found = []
    for change, same_result, other, launched in _changes(recipe, launch):
        total = plan(other, launched).total
        if total <= limit:
            found.append(Suggestion(change, total, same_result))
    return sorted(found, key=lambda remedy: (not remedy.same_result, -remedy.total))


def _changes(recipe: RunRecipe, launch: Launch) -> Iterator[tuple[str, bool, RunRecipe, Launch]]:
    least = recipe.max_seq_length
    for half in _HALVES:
        fewer = recipe.microbatch_tokens // half
        if fewer >= least:
            yield from _said(f"--microbatch_tokens {fewer}", True, recipe, launch, microbatch_tokens=fewer)
    if recipe.microbatch_tokens > least and recipe.microbatch_tokens // 2 < least:
        yield from _said(f"--microbatch_tokens {least}", True, recipe, launch, microbatch_tokens=least)
    if not recipe.training_arguments.get("gradient_checkpointing"):
        both: dict[str, Any] = {"gradient_checkpointing": True}
        yield from _said("--gradient_checkpointing true", True, recipe, launch, **both)
        if recipe.microbatch_tokens > least:
            both["microbatch_tokens"] = least
            yield from _said(f"--gradient_checkpointing true --microbatch_tokens {least}", True, recipe, launch, **both)
    if launch.world_size > 1 and launch.engine != FSDP:
        for file in ("zero1", "zero2", "zero3", "zero3_offload"):
            stage = int(file.removeprefix("zero")[0])
            if (launch.zero_stage or 0) >= stage and "offload" not in file:
                continue
            config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000}}
            offload = ("optimizer", "param") if "offload" in file else ()
            other = Launch(DEEPSPEED, launch.world_size, f"accelerate_configs/{file}.yaml", config, offload)
            change = f"--config_file accelerate_configs/{file}.yaml"
            yield change, True, recipe, other
            if stage == 3:
                yield from _said(
                    f"{change} --gradient_checkpointing true", True, recipe, other, gradient_checkpointing=True
                )
    if recipe.tune == "full":
        yield from _said("--tune lora", False, recipe, launch, tune="lora")
    if recipe.tune != "qlora":
        yield from _said("--tune qlora", False, recipe, launch, tune="qlora")
        yield from _said(
            "--tune qlora --gradient_checkpointing true", False, recipe, launch,
            tune="qlora", gradient_checkpointing=True,
        )  # fmt: skip


def _said(
    change: str, same_result: bool, recipe: RunRecipe, launch: Launch, **values: Any
) -> Iterator[tuple[str, bool, RunRecipe, Launch]]:
    try:
        yield change, same_result, recipe.with_values(**values), launch
    except UserError:  # it would contradict another key: no remedy
        return
