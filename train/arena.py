"""Predict which of two answers people prefer: an encoder, or the classical baselines that it must beat.

accelerate launch train/arena.py
python train/arena.py --config train/configs/arena_baselines.yaml
python train/arena.py --config train/configs/arena_baselines.yaml --dataset_name FOLDER --output_dir runs/mine
"""

import sys
from pathlib import Path

from isotune.commands.arena import read_arena_recipe, train_arena
from isotune.io.errors import run_script
from isotune.run.malloc_tuning import restart_with_malloc_tuning

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "arena_bert.yaml"


def main() -> None:
    """A recipe, and the run that it describes; `isotune arena` does the same."""
    train_arena(read_arena_recipe(sys.argv[1:], default_config=DEFAULT_CONFIG, prog="train/arena.py"))


if __name__ == "__main__":
    restart_with_malloc_tuning()
    run_script(main)
