"""Classification of Yelp reviews by their stars, unpadded and exact, on whatever this is launched on.

accelerate launch train/yelp.py
accelerate launch train/yelp.py --tune lora --output_dir runs/yelp_lora
python train/yelp.py --config train/configs/opinions_tiny.yaml
"""

import sys
from pathlib import Path

from isotune.errors import run_script
from isotune.recipe import ClassificationRecipe, read_recipe

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "yelp_bert.yaml"


def main() -> None:
    """Recipe, data, model, trainer; train, save, show."""
    recipe = read_recipe(
        sys.argv[1:],
        default_config=DEFAULT_CONFIG,
        prog="train/yelp.py",
        description="Classification of Yelp reviews by their stars, unpadded and exact.",
        kind=ClassificationRecipe,
    )
    # the engine takes seconds to import: a mistake in the recipe has been answered by now
    from isotune.models.loading import load_config, load_tokenizer
    from isotune.report.loss_curve import draw_loss_curve
    from isotune.training import classification
    from isotune.training.launch import start_process
    from isotune.training.preemption import supervised
    from isotune.training.run_folder import RunFolder

    process = start_process(recipe)
    run = RunFolder(recipe)
    run.check()
    config = load_config(recipe)
    tokenizer = load_tokenizer(recipe, needed=("pad",))
    data = classification.prepare_data(recipe, tokenizer, process)

    model = classification.build_model(recipe, config, data, process)
    trainer = classification.build_trainer(recipe, process, run, model, tokenizer, data)
    with supervised(run, process):
        trainer.train()
        saved = classification.save(recipe, run, trainer, tokenizer)
    if saved is not None:
        print(f"model       {run.model}: {saved}")
        print(f"loss curve  {draw_loss_curve(run.path)}")


if __name__ == "__main__":
    run_script(main)
