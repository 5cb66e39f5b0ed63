"""Instruction tuning of a causal language model, packed and exact, on any engine: `isotune sft`, train/sft_opt.py."""

from collections.abc import Sequence
from pathlib import Path

from isotune.commands.before_torch import before_torch
from isotune.config import Recipe, read_recipe


def read_sft_recipe(argv: Sequence[str], *, default_config: Path | None, prog: str) -> Recipe:
    """The recipe of a command line; UserError says what is wrong with it."""
    return read_recipe(
        argv,
        default_config=default_config,
        prog=prog,
        description="Instruction tuning of a causal language model, packed and exact.",
    )


def train_sft(recipe: Recipe) -> None:
    """Data, model, trainer; train, save, show."""
    before_torch()
    # the engine takes seconds to import: a mistake in the recipe has been answered by now
    from isotune.data.sft.preparation import prepare_conversations
    from isotune.evaluation.generation.chat import print_sample_answer
    from isotune.preflight.startup_check import train_checked
    from isotune.report.finishing import last_steps
    from isotune.run.finishing import FinishingStep
    from isotune.training.from_recipe import start_run

    start, finishing = start_run(recipe), last_steps(recipe)
    recipe = start.with_row_tokens(recipe)
    if prompt := recipe.sample_prompt:  # last: nothing of the run depends on it
        answer = lambda: print_sample_answer(start.run.path, prompt)  # noqa: E731
        finishing.append(FinishingStep("sample_answer", answer, is_outside=True))
    train_checked(start, lambda: prepare_conversations(recipe, start.tokenizer, show=start.process.is_main), finishing)
