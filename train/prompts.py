"""Classification of prompts as commands, statements and questions, with a negative control.

accelerate launch train/prompts.py
accelerate launch train/prompts.py --label_source random --output_dir runs/prompts_control
python train/prompts.py --model_name_or_path ~/models/bert --dataset_name ~/data/prompts.csv --sentences "Is it late?"
"""

import sys
from pathlib import Path
from typing import Any

from isotune.config import ClassificationRecipe, read_recipe
from isotune.io.errors import run_script
from isotune.run.malloc_tuning import restart_with_malloc_tuning

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "prompts_bert.yaml"


def main() -> None:
    """Recipe, processes, data; model, trainer, steps; verdict, sentences, picture."""
    recipe = read_recipe(
        sys.argv[1:],
        default_config=DEFAULT_CONFIG,
        prog="train/prompts.py",
        description="Classification of prompts as commands, statements and questions, with a negative control.",
        kind=ClassificationRecipe,
    )
    # the engine takes seconds to import: a mistake in the recipe has been answered by now
    from isotune.data.classification.split import prepare_labelled
    from isotune.evaluation.classification.chance_test import write_chance_test
    from isotune.evaluation.classification.sentences import show_sentences
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
            show_sentences(start.run.path, recipe.sentences, start.process.device)
        print(f"loss curve  {draw_loss_curve(start.run.path)}")
        evaluation: Any = data.evaluation
        if evaluation is not None:
            print(f"verdict     {write_chance_test(start.run.path, recipe, evaluation)}")

    if train_run(checked, data, before_finishing) is not None:
        share(recipe)


if __name__ == "__main__":
    restart_with_malloc_tuning()
    run_script(main)
