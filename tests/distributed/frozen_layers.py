"""A script that trains the upper part of a classifier, frozen below, in any launch, and saves it by FinalModel.

python tests/distributed/frozen_layers.py FOLDER [bf16]
"""

import sys
from pathlib import Path

import torch
from tests.distributed.drop_in_matrix import QUIET, placed
from tests.numerics.test_drop_in import STEPS, bert, texts
from transformers import TrainingArguments

import isotune
from isotune.callbacks import FinalModel, RunFolder
from isotune.compat.transformers import bf16_without_gpu
from isotune.models.base.builtin import builtin_tokenizer


def main() -> None:
    """Train three updates."""
    folder = Path(sys.argv[1])
    shared = {**QUIET, **STEPS, **placed(), "bf16": "bf16" in sys.argv}
    model = bert()
    for part in (model.bert.embeddings, model.bert.encoder.layer[0]):
        part.requires_grad_(False)
    with bf16_without_gpu():
        args = TrainingArguments(str(folder / "out"), per_device_train_batch_size=4, **shared)
    isotune.Trainer(
        model=model,
        args=args,
        train_dataset=texts(),
        processing_class=builtin_tokenizer("builtin:bert-tiny"),
        callbacks=[RunFolder(folder / "run"), FinalModel()],
    ).train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
