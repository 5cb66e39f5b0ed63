"""Classification of Yelp reviews by stars, without padding, on any engine.

accelerate launch train/yelp.py
accelerate launch train/yelp.py --tune lora --output_dir runs/yelp_lora
python train/yelp.py --config train/configs/opinions_tiny.yaml
"""

import sys
from pathlib import Path

from isotune.commands.classification import read_classification_recipe, train_classifier
from isotune.io.errors import run_script
from isotune.run.malloc_tuning import restart_with_malloc_tuning

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "yelp_bert.yaml"
DESCRIPTION = "Classification of Yelp reviews by their stars, unpadded and exact."


def main() -> None:
    """A recipe, and the run that it describes; `isotune classify` does the same."""
    recipe = read_classification_recipe(
        sys.argv[1:], default_config=DEFAULT_CONFIG, prog="train/yelp.py", description=DESCRIPTION
    )
    train_classifier(recipe)


if __name__ == "__main__":
    restart_with_malloc_tuning()
    run_script(main)
