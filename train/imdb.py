"""Classification of IMDb reviews by sentiment, without padding, on any engine.

accelerate launch train/imdb.py
accelerate launch train/imdb.py --config train/configs/imdb_bert.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml train/imdb.py
"""

import sys
from pathlib import Path

from isotune.commands.classification import read_classification_recipe, train_classifier
from isotune.io.errors import run_script
from isotune.run.malloc_tuning import restart_with_malloc_tuning

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "imdb_distilbert.yaml"
DESCRIPTION = "Classification of IMDb reviews by their sentiment, unpadded and exact."


def main() -> None:
    """A recipe, and the run that it describes; `isotune classify` does the same."""
    recipe = read_classification_recipe(
        sys.argv[1:], default_config=DEFAULT_CONFIG, prog="train/imdb.py", description=DESCRIPTION
    )
    train_classifier(recipe)


if __name__ == "__main__":
    restart_with_malloc_tuning()
    run_script(main)
