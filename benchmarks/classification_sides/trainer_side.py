"""Stock Trainer: DataCollatorWithPadding, its own loss, optimizer and logging, on steps of 32 documents.

`trainer_default` has them in random order, as its default sampler would; `trainer_grouped` as its length-grouped
sampler made them of the whole training set.
"""

from argparse import Namespace
from typing import Any

import torch
from datasets import Dataset
from sft_sides.process import Metronome
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from classification_sides.material import DOCUMENTS_PER_STEP, facts_of_training, geometry, material, padding

SAME_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def run(metronome: Metronome, side: str, mode: str, given: Namespace, scratch: str) -> None:
    """Train until the metronome ends it."""
    shared = material(mode, side, given, scratch)
    recipe, documents = shared.recipe, shared.prepared.documents
    order = shared.grouped if side == "trainer_grouped" else shared.mixed
    args = TrainingArguments(
        **{name: recipe.training_arguments[name] for name in SAME_ARGUMENTS},
        output_dir=recipe.output_dir,
        max_steps=recipe.max_steps,
        seed=recipe.seed,
        per_device_train_batch_size=given.peer_batch,
        gradient_accumulation_steps=DOCUMENTS_PER_STEP // given.peer_batch,
        train_sampling_strategy="sequential",  # the order is made here
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )

    def rows_of(numbers: list[int]) -> list[dict[str, Any]]:
        spans = [slice(int(documents.starts[n]), int(documents.starts[n + 1])) for n in numbers]
        ids = [documents.input_ids[span].tolist() for span in spans]
        return [{"input_ids": i, "labels": int(documents.labels[n])} for i, n in zip(ids, numbers, strict=True)]

    torch.manual_seed(recipe.seed)
    config = geometry(recipe, shared.tokenizer, given)
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_config(config, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows_of(order)),
        data_collator=DataCollatorWithPadding(shared.tokenizer),
        processing_class=shared.tokenizer,
    )

    @torch.no_grad()
    def facts() -> dict[str, Any]:
        model: Any = trainer.model_wrapped
        model.eval()
        # the documents that isotune's and the default side's first step see
        first = trainer._prepare_inputs(trainer.data_collator(rows_of(shared.mixed[:DOCUMENTS_PER_STEP])))
        loss: Any = trainer.compute_loss(model, first)
        lengths = documents.lengths
        batches = [order[i : i + given.peer_batch] for i in range(0, len(order), given.peer_batch)]
        tokens = int(lengths[order].sum())
        positions = round(tokens / (1 - padding(lengths, batches)))
        return facts_of_training(loss.item(), len(order), tokens, positions, shared.epoch[side])

    class Hold(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            metronome.beat(facts)

    trainer.add_callback(Hold())
    trainer.train()
