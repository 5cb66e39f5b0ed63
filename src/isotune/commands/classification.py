"""Classification of texts, without padding, on any engine: `isotune classify`, train/yelp.py, imdb.py, prompts.py."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotune.commands.before_torch import before_torch
from isotune.config import ClassificationRecipe, read_recipe


def read_classification_recipe(
    argv: Sequence[str], *, default_config: Path | None, prog: str, description: str
) -> ClassificationRecipe:
    """The recipe of a command line; UserError says what is wrong with it."""
    return read_recipe(
        argv, default_config=default_config, prog=prog, description=description, kind=ClassificationRecipe
    )


def train_classifier(recipe: ClassificationRecipe, *, tests_chance: bool = False) -> None:
    """Processes, data; model, trainer, steps; sentences, picture.

    `tests_chance`: compare the accuracy with that of chance, which is the verdict of a negative control.
    """
    before_torch()
    # the engine takes seconds to import: a mistake in the recipe has been answered by now
    import torch

    from isotune.data.classification.split import prepare_labelled
    from isotune.evaluation.classification.chance_test import write_chance_test
    from isotune.evaluation.classification.sentences import show_sentences
    from isotune.evaluation.classification.thresholds import keep_thresholds
    from isotune.evaluation.models import load_run_classifier
    from isotune.evaluation.samples import write_samples
    from isotune.preflight.startup_check import train_checked
    from isotune.report.finishing import last_steps
    from isotune.run.finishing import FinishingStep
    from isotune.training.from_recipe import start_run

    start = start_run(recipe)
    recipe = start.with_row_tokens(recipe)
    prepared = functools.cache(lambda: prepare_labelled(recipe, start.tokenizer, show=start.process.is_main))

    def test_chance() -> None:
        evaluation: Any = prepared().evaluation
        if evaluation is not None:
            print(f"verdict     {write_chance_test(start.run.path, recipe, evaluation)}")

    def say_thresholds() -> None:
        print(f"thresholds  {keep_thresholds(start.run.path, recipe, prepared(), start.process.device)}")

    def classify_sentences() -> None:
        classifier = load_run_classifier(start.run.path, start.process.device, torch.float32)
        write_samples(start.run.path, show_sentences(classifier, recipe.sentences or []))

    finishing = [
        *([FinishingStep("thresholds", say_thresholds)] if recipe.label_thresholds is not None else ()),
        *([FinishingStep("sentences", classify_sentences)] if recipe.sentences else ()),
        *([FinishingStep("chance_test", test_chance)] if tests_chance else ()),
        *last_steps(recipe),
    ]
    train_checked(start, prepared, finishing)
