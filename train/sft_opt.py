"""Instruction tuning of a causal language model, packed and exact, on any engine.

accelerate launch train/sft_opt.py
accelerate launch train/sft_opt.py --config train/configs/opt350m_full.yaml --learning_rate 1e-5
python train/sft_opt.py --config train/configs/demo.yaml
"""

import sys
from pathlib import Path

from isotune.config import read_recipe
from isotune.io.errors import run_script
from isotune.run.malloc_tuning import restart_with_malloc_tuning

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "opt350m_lora.yaml"


def main() -> None:
    """Recipe, data, model, trainer; train, save, show."""
    recipe = read_recipe(
        sys.argv[1:],
        default_config=DEFAULT_CONFIG,
        prog="train/sft_opt.py",
        description="Instruction tuning of a causal language model, packed and exact.",
    )
    # the engine takes seconds to import: a mistake in the recipe has been answered by now
    from isotune.data.sft.preparation import prepare_conversations
    from isotune.evaluation.generation.chat import print_sample_answer
    from isotune.preflight.startup_check import startup_check
    from isotune.report.loss_curve import draw_loss_curve
    from isotune.report.model_card import share
    from isotune.training.from_recipe import start_run, train_run

    start = start_run(recipe)
    data = prepare_conversations(recipe, start.tokenizer, show=start.process.is_main)
    start = startup_check(start, data)
    if start is None:
        return
    if train_run(start, data) is not None:
        print(f"loss curve  {draw_loss_curve(start.run.path)}")
        if recipe.sample_prompt:
            print_sample_answer(start.run.path, recipe.sample_prompt)
        share(recipe)


if __name__ == "__main__":
    restart_with_malloc_tuning()
    run_script(main)
