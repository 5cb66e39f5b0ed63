"""Which of two answers people prefer, by an encoder or by classical baselines: `isotune arena`, train/arena.py."""

import functools
from pathlib import Path
from typing import Any

from isotune.commands.before_torch import before_torch
from isotune.io.extras import need
from isotune.projects.arena.recipes import ArenaRecipe, BaselinesRecipe, read_arena_recipe

__all__ = ["read_arena_recipe", "train_arena"]


def train_arena(recipe: ArenaRecipe | BaselinesRecipe) -> None:
    """The recipe says by which method."""
    before_torch()
    if isinstance(recipe, BaselinesRecipe):
        for package in ("simplemma", "nltk", "skops"):
            need(package, "method: baselines")
        from isotune.projects.arena.baselines.run import run_baselines

        run_baselines(recipe)
    else:
        train_encoder(recipe)


def train_encoder(recipe: ArenaRecipe) -> None:
    """Processes, data; model, trainer, steps; submission, scores, picture."""
    # the engine takes seconds to import: a mistake in the recipe has been answered by now
    from isotune.preflight.startup_check import train_checked
    from isotune.projects.arena.battles import read_competition
    from isotune.projects.arena.encoder import evaluate_encoder, prepare_competition
    from isotune.report.finishing import last_steps
    from isotune.run.finishing import FinishingStep
    from isotune.training.from_recipe import start_run

    start = start_run(recipe)
    recipe = start.with_row_tokens(recipe)

    @functools.cache
    def prepared() -> tuple[Any, ...]:
        files = read_competition(Path(recipe.dataset_name))
        return files, *prepare_competition(files, recipe, start.tokenizer)

    def evaluate() -> None:
        files, _, kept = prepared()
        evaluate_encoder(start.run.path, recipe, files, kept, start.process.device)

    train_checked(
        start,
        lambda: prepared()[1].shown(start.process.is_main),
        [FinishingStep("submission", evaluate), *last_steps(recipe)],
    )
