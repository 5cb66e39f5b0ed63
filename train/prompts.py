"""Classification of prompts as commands, statements and questions, with a negative control.

accelerate launch train/prompts.py
accelerate launch train/prompts.py --label_source random --output_dir runs/prompts_control
python train/prompts.py --model_name_or_path ~/models/bert --dataset_name ~/data/prompts.csv --sentences "Is it late?"
"""

import sys
from pathlib import Path

from isotune.commands.classification import read_classification_recipe, train_classifier
from isotune.io.errors import run_script
from isotune.run.malloc_tuning import restart_with_malloc_tuning

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "prompts_bert.yaml"
DESCRIPTION = "Classification of prompts as commands, statements and questions, with a negative control."


def main() -> None:
    """A recipe, and the run that it describes; `isotune classify` does the same."""
    recipe = read_classification_recipe(
        sys.argv[1:], default_config=DEFAULT_CONFIG, prog="train/prompts.py", description=DESCRIPTION
    )
    train_classifier(recipe, tests_chance=True)


if __name__ == "__main__":
    restart_with_malloc_tuning()
    run_script(main)
