"""What every side shares: the geometry, the shipped recipe, and the rows that a round trains on."""

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import OPTConfig

from isotune.config import Recipe
from isotune.data.documents import PreparedData, Rows
from isotune.data.sft.preparation import SftSettings, prepare
from isotune.models.opening import load_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
ROW_TOKENS = 1_024


def geometry(given: Namespace) -> OPTConfig:
    """OPT-350M's configuration."""
    return OPTConfig(
        hidden_size=1024, word_embed_proj_dim=512, ffn_dim=4096, num_hidden_layers=given.layers,
        num_attention_heads=16, vocab_size=50272, max_position_embeddings=2048, do_layer_norm_before=False,
        dropout=0.1, attention_dropout=0.0, activation_function="relu", pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip


def shipped_recipe(mode: str, side: str, given: Namespace, scratch: str) -> Recipe:
    """The recipe of train/configs, on the local data, without evaluation and without an end."""
    values = yaml.safe_load((CONFIGS / f"opt350m_{mode}.yaml").read_text("utf-8"))
    for elsewhere in ("eval_dataset_name", "eval_dataset_split", "num_train_epochs", "dataset_split"):
        values.pop(elsewhere, None)
    values |= {
        "model_name_or_path": "OPT-350M's geometry",
        "model_init": "random",
        "tokenizer_name_or_path": str(given.tokenizer),
        "dataset_name": str(given.conversations),
        "global_batch_size": given.rows_per_step,
        "microbatch_tokens": given.rows_per_pass * ROW_TOKENS,
        "gradient_checkpointing": given.gradient_checkpointing,
        "max_steps": 1_000_000,
        "disable_tqdm": True,
        "output_dir": str(Path(scratch) / f"{mode}-{side}-{os.getpid()}"),
        "save_strategy": "no",
    }
    if (exact := getattr(given, "exact_gradients", None)) is not None:
        values["exact_gradients"] = exact
    return Recipe.from_values(**values)


def rows_of_a_round(recipe: Recipe, given: Namespace) -> tuple[Any, PreparedData, int]:
    """The tokenizer, the prepared data with the rows of one round only, and the number of a document that fills a row.

    All rows are full. They lie evenly in the order of the packing, which goes from rows of one long document to rows
    of many short ones.

    Raises:
        ValueError: the data do not fill as many rows as a round needs.
    """
    tokenizer = load_tokenizer(recipe)
    settings = SftSettings(max_seq_length=ROW_TOKENS, seed=recipe.seed)
    data = prepare(recipe.dataset_name, recipe.dataset_split, tokenizer, settings, show_progress=False)
    lengths = data.documents.lengths
    full = np.flatnonzero(data.rows.lengths(lengths) == ROW_TOKENS)
    wanted = given.steps_per_round * given.rows_per_step
    if len(full) < wanted:
        raise ValueError(f"the data fill {len(full)} rows of {ROW_TOKENS} tokens, and a round needs {wanted}")
    picked = [data.rows[int(full[(2 * i + 1) * len(full) // (2 * wanted)])] for i in range(wanted)]
    rows = Rows(np.concatenate(picked), np.cumsum([0, *map(len, picked)]))
    return tokenizer, replace(data, rows=rows), int(np.flatnonzero(lengths == ROW_TOKENS)[0])


def facts_of_training(loss: float, input_tokens: int, supervised_tokens: int) -> dict[str, Any]:
    """What must be the same on every side: one document's mean loss without dropout, and the tokens of a round."""
    return {"loss": loss, "input_tokens": input_tokens, "supervised_tokens": supervised_tokens}
