"""What every side shares: BERT-base's geometry, the shipped recipe, and the documents that a round trains on.

A round is a few steps of 32 documents. Which documents: those of a few batches that stock Trainer's length-grouped
sampler makes of the whole training set, taken evenly from its shortest batch to its longest. So the grouped side sees
real batches of a real epoch, and the others the same documents in one random order.
"""

import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import BertConfig
from transformers.trainer_pt_utils import LengthGroupedSampler

from isotune.config import ClassificationRecipe
from isotune.data.classification.labels import ClassificationSettings
from isotune.data.classification.preparation import tokenize
from isotune.data.documents import PreparedData
from isotune.data.sources.source import read_rows
from isotune.models.opening import load_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
CLASSES = {"imdb": 2, "yelp": 5}
TOKENIZERS = {"imdb": "bert-base-uncased", "yelp": "bert-base-cased"}
DOCUMENTS_PER_STEP = 32
MAX_TOKENS = 512


@dataclass(frozen=True)
class Material:
    """The prepared training set, and the numbers of a round's documents in the order of each kind of side.

    Attributes:
        mixed: in random order.
        grouped: in batches of about one length, the batches in random order.
        epoch: share of padding in a whole epoch of the stock samplers, by kind.
    """

    recipe: ClassificationRecipe
    tokenizer: Any
    prepared: PreparedData
    mixed: list[int]
    grouped: list[int]
    epoch: dict[str, float]


def geometry(recipe: ClassificationRecipe, tokenizer: Any, given: Namespace) -> BertConfig:
    """BERT-base's configuration for the recipe's classes."""
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=given.layers)
    config.num_labels = recipe.num_labels  # type: ignore[assignment]  (a property with a setter)
    return config


def material(data: str, side: str, given: Namespace, scratch: str) -> Material:
    """The shipped recipe on the local data, and the documents of a round."""
    values = yaml.safe_load((CONFIGS / f"{data}_bert.yaml").read_text("utf-8"))
    for elsewhere in ("eval_dataset_name", "eval_dataset_split", "eval_microbatch_tokens", "num_train_epochs"):
        values.pop(elsewhere, None)
    values |= {
        "model_name_or_path": "BERT-base's geometry",
        "model_init": "random",
        "tokenizer_name_or_path": str(given.data / "tokenizers" / TOKENIZERS[data]),
        "dataset_name": str(given.data / data),
        "num_labels": CLASSES[data],
        "global_batch_size": DOCUMENTS_PER_STEP,
        "max_seq_length": MAX_TOKENS,
        "microbatch_tokens": given.microbatch_tokens,
        "max_steps": 1_000_000,
        "disable_tqdm": True,
        "output_dir": str(Path(scratch) / f"{data}-{side}-{os.getpid()}"),
        "save_strategy": "no",
    }
    recipe = ClassificationRecipe.from_values(**values)
    tokenizer = load_tokenizer(recipe, needed=("pad",))
    settings = ClassificationSettings.of(recipe)
    prepared = tokenize(read_rows(recipe.dataset_name), tokenizer, settings, show_progress=False).prepared()
    lengths = prepared.documents.lengths
    generator = torch.Generator().manual_seed(recipe.seed)
    order = list(LengthGroupedSampler(DOCUMENTS_PER_STEP, lengths=lengths.tolist(), generator=generator))
    batches = [order[i : i + DOCUMENTS_PER_STEP] for i in range(0, len(order), DOCUMENTS_PER_STEP)]
    whole = sorted((b for b in batches if len(b) == DOCUMENTS_PER_STEP), key=lambda b: int(lengths[b].sum()))
    steps = given.steps_per_round
    picked = [whole[(2 * i + 1) * len(whole) // (2 * steps)] for i in range(steps)]
    chance = np.random.default_rng(recipe.seed)
    grouped = [document for number in chance.permutation(steps) for document in picked[number]]
    shuffled = chance.permutation(len(lengths))
    random_batches = [shuffled[i : i + DOCUMENTS_PER_STEP] for i in range(0, len(shuffled), DOCUMENTS_PER_STEP)]
    epoch = {"trainer_default": padding(lengths, random_batches), "trainer_grouped": padding(lengths, batches)}
    return Material(recipe, tokenizer, prepared, chance.permutation(grouped).tolist(), grouped, epoch)


def padding(lengths: np.ndarray, batches: list[Any]) -> float:
    """The share of positions that are padding when every batch is padded to its longest document."""
    positions = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / positions


def facts_of_training(loss: float, documents: int, tokens: int, positions: int, epoch_padding: float) -> dict[str, Any]:
    """What a side says of a round: the loss of its first 32 documents without dropout, what it reads, and how."""
    return {"loss": loss, "documents": documents, "tokens": tokens, "positions": positions,
            "epoch_padding": epoch_padding}  # fmt: skip
