"""What every side shares: the weights they start from, the documents, the optimizer's settings, the global batch."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification
from transformers.utils import logging

from isotune.data.sources.source import find_corpus
from isotune.models.base.builtin import builtin_tokenizer

TOKENIZER = "builtin:opt-tiny"
ROW_TOKENS = 128
GLOBAL_BATCH = 6  # rows or documents of an update; 1, 2 and 3 processes divide it, or the peers could not be asked
DOCUMENTS = {"train": 95, "test": 23}  # as in life, no multiple of anything
OPTIMIZER: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "seed": 42,
}
DROPOUTS = {"off": 0.0, "on": 0.1}


def write_material(folder: Path) -> None:
    """Lay the material down in `folder`.

    `TASK-dropout_WORD` are models of 60 thousand parameters, with the same weights for every dropout;
    `train.jsonl` and `test.jsonl` have a `text` a line, `train_labels.json` and `test_labels.json` its class.
    """
    logging.disable_progress_bar()
    for task, kind in (("causal", OPTForCausalLM), ("classifier", OPTForSequenceClassification)):
        for word, dropout in DROPOUTS.items():
            torch.manual_seed(0)
            model = kind(_geometry(dropout))
            model.save_pretrained(folder / f"{task}-dropout_{word}")
    for split, number in DOCUMENTS.items():
        texts = [row["text"] for row in random.Random(1).sample(find_corpus("builtin:capitals").rows(split), number)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
        labels = [int("Where does" in text.split("\n")[0]) for text in texts]  # what the first question asks
        (folder / f"{split}_labels.json").write_text(json.dumps(labels))


def _geometry(dropout: float) -> OPTConfig:
    return OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=len(builtin_tokenizer(TOKENIZER)), max_position_embeddings=512,
        dropout=dropout, attention_dropout=0.0, activation_function="relu",
        pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
