"""Instruction tuning of a causal language model, packed and exact, on any engine.

accelerate launch train/sft_opt.py
accelerate launch train/sft_opt.py --config train/configs/opt350m_full.yaml --learning_rate 1e-5
python train/sft_opt.py --config train/configs/demo.yaml
"""

import sys
from pathlib import Path

from isotune.commands.sft import read_sft_recipe, train_sft
from isotune.io.errors import run_script
from isotune.run.malloc_tuning import restart_with_malloc_tuning

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "opt350m_lora.yaml"


def main() -> None:
    """A recipe, and the run that it describes; `isotune sft` does the same."""
    train_sft(read_sft_recipe(sys.argv[1:], default_config=DEFAULT_CONFIG, prog="train/sft_opt.py"))


if __name__ == "__main__":
    restart_with_malloc_tuning()
    run_script(main)
