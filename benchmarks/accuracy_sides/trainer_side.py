"""Stock Trainer with its own loss, collator and optimizer, on the same token ids and with the same hyperparameters.

Its batches are grouped by length, which halves its time; padding and the rest are Trainer's defaults.
"""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from accuracy_sides.material import NotYet, recipe_values, write_predictions

SAME_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def run(data: str, folder: Path, given: Namespace) -> None:
    """Train and evaluate, or go on with it.

    Raises:
        NotYet: the time was over.
    """
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_utils import get_last_checkpoint

    from isotune.config import ClassificationRecipe
    from isotune.data.classification.labels import ClassificationSettings
    from isotune.data.classification.preparation import tokenize
    from isotune.data.sources.source import read_rows
    from isotune.models.opening import load_tokenizer

    started = time.monotonic()
    recipe = ClassificationRecipe.from_values(**recipe_values(data, folder, given))
    tokenizer = load_tokenizer(recipe, needed=("pad",))
    settings = ClassificationSettings.of(recipe)

    def rows_of(split: str) -> Dataset:
        documents = tokenize(read_rows(recipe.dataset_name, split), tokenizer, settings, show_progress=False).documents
        spans = zip(documents.starts[:-1], documents.starts[1:], strict=True)
        ids = [documents.input_ids[a:b].tolist() for a, b in spans]
        columns = {"input_ids": ids, "labels": documents.labels.tolist(), "length": list(map(len, ids))}
        return Dataset.from_dict(columns)

    class StopInTime(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if given.stop_after_seconds and time.monotonic() - started > given.stop_after_seconds:
                control.should_save = control.should_training_stop = True

    args = TrainingArguments(
        **{name: recipe.training_arguments[name] for name in SAME_ARGUMENTS},
        output_dir=recipe.output_dir,
        num_train_epochs=recipe.num_train_epochs,
        per_device_train_batch_size=recipe.global_batch_size,
        per_device_eval_batch_size=recipe.global_batch_size,
        train_sampling_strategy="group_by_length",
        seed=recipe.seed,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="steps",
        save_steps=50,
        save_total_limit=1,
        logging_steps=10,
        disable_tqdm=True,
    )
    set_seed(recipe.seed)
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            recipe.model_name_or_path, num_labels=recipe.num_labels, dtype=torch.float32
        ),
        args=args,
        train_dataset=rows_of("train"),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[StopInTime()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    before = Path(recipe.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(before)) if before.is_dir() else None)
    if trainer.state.global_step < trainer.state.max_steps:
        raise NotYet
    test = rows_of("test")
    trainer.args.train_sampling_strategy = "random"  # else predictions come in order of length, each beside another row
    found: Any = trainer.predict(test)  # type: ignore[arg-type]  (a datasets.Dataset serves)
    if found.label_ids.tolist() != list(test["labels"]):
        raise RuntimeError("Trainer's predictions are not in the order of the rows")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    write_predictions(
        folder,
        list(test["labels"]),
        found.predictions.argmax(axis=1).tolist(),
        steps=trainer.state.global_step,
        final_loss=sum(losses[-2:]) / 2,
    )
