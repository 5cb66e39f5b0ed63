"""isotune.SFTTrainer in a script of TRL's, on the rows that the TRL side has."""

from argparse import Namespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig

import isotune
from sft_sides.isotune_side import hold
from sft_sides.material import geometry, rows_of_a_round, shipped_recipe
from sft_sides.process import Metronome
from sft_sides.trl_side import adapter_of, packed_row, same_arguments


def run(metronome: Metronome, side: str, mode: str, given: Namespace, scratch: str) -> None:
    """Train until the metronome ends it."""
    recipe = shipped_recipe(mode, side, given, scratch)
    tokenizer, data, alone = rows_of_a_round(recipe, given)
    rows = [packed_row(data.documents, data.rows[number]) for number in range(len(data.rows))]
    torch.manual_seed(recipe.seed)
    trainer: Any = isotune.SFTTrainer(
        model=AutoModelForCausalLM.from_config(geometry(given), dtype=torch.float32),
        args=SFTConfig(**same_arguments(recipe, given)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter_of(recipe) if mode == "lora" else None,
        microbatch_tokens=recipe.forward_tokens("microbatch_tokens"),
        exact_gradients=recipe.exact_gradients,
    )
    hold(trainer, metronome, data.documents, alone, given)
    trainer.train()
