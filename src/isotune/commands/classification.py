"""Classification of texts, without padding, on any engine: `isotune classify`, train/yelp.py, imdb.py, prompts.py."""

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
    from isotune.evaluation.models import load_run_classifier
    from isotune.preflight.startup_check import startup_check
    from isotune.report.loss_curve import draw_loss_curve
    from isotune.report.model_card import share
    from isotune.training.from_recipe import start_run, train_run

    start = start_run(recipe)
    data = prepare_labelled(recipe, start.tokenizer, show=start.process.is_main)
    checked = startup_check(start, data)
    if checked is None:
        return

    def before_finishing() -> None:
        if recipe.sentences:
            classifier = load_run_classifier(start.run.path, start.process.device, torch.float32)
            show_sentences(classifier, recipe.sentences)
        evaluation: Any = data.evaluation
        if tests_chance and evaluation is not None:
            print(f"verdict     {write_chance_test(start.run.path, recipe, evaluation)}")

    if train_run(checked, data, before_finishing) is not None:
        print(f"loss curve  {draw_loss_curve(start.run.path)}")
        share(recipe)
