"""Classification of Yelp reviews by stars, without padding, on any engine.

accelerate launch train/yelp.py
accelerate launch train/yelp.py --tune lora --output_dir runs/yelp_lora
python train/yelp.py --config train/configs/opinions_tiny.yaml
"""

import sys
from pathlib import Path

from isotune.config import ClassificationRecipe, read_recipe
from isotune.io.errors import run_script
from isotune.run.malloc_tuning import restart_with_malloc_tuning

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "yelp_bert.yaml"


def main() -> None:
    """Recipe, processes, data; model, trainer, steps; picture."""
    recipe = read_recipe(
        sys.argv[1:],
        default_config=DEFAULT_CONFIG,
        prog="train/yelp.py",
        description="Classification of Yelp reviews by their stars, unpadded and exact.",
        kind=ClassificationRecipe,
    )
    # the engine takes seconds to import: a mistake in the recipe has been answered by now
    from isotune.data.classification.split import prepare_labelled
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

    if train_run(checked, data, before_finishing) is not None:
        print(f"loss curve  {draw_loss_curve(start.run.path)}")
        share(recipe)


if __name__ == "__main__":
    restart_with_malloc_tuning()
    run_script(main)
