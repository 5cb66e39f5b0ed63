"""The run that is killed: a tiny model with dropout, checkpoints and evaluations every few steps."""

from pathlib import Path
from typing import Any

import yaml

STEPS = 12


def make_model(folder: Path) -> None:
    """A random OPT of a few thousand parameters with the built-in tokenizer."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    from isotune.models.base.builtin import builtin_tokenizer

    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    torch.manual_seed(7)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, dropout=0.1, attention_dropout=0.1, init_std=0.1,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(folder: Path, model: Path) -> Path:
    """The recipe of the run in `folder/run`; the same for every engine."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe: dict[str, Any] = {
        "model_name_or_path": str(model),
        "dataset_name": "builtin:greetings",
        "eval_dataset_name": "builtin:greetings",
        "output_dir": str(folder / "run"),
        "tune": "full",
        "learning_rate": 1e-3,
        "max_seq_length": 64,
        "global_batch_size": 3,
        "microbatch_tokens": 128,  # two rows: each of two ranks has a microbatch in a step
        "max_steps": STEPS,
        "save_steps": 2,
        "eval_steps": 4,
        "metric_for_best_model": "eval_loss",
        "ddp_timeout": 60,  # a rank that hangs ends the attempt within two minutes
        "sample_prompt": "",
        "disable_tqdm": True,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file
