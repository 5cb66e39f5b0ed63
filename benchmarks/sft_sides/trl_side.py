"""TRL's SFTTrainer on rows in the form that its own packing gives them: input_ids, labels, seq_lengths.

TRL's preparation would supervise the prompts of a text, so the rows are made here and `skip_prepare_dataset` is set.
Collator, padding-free batches, loss, metrics, optimizer and logging are TRL's defaults.
"""

import os
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from isotune.config import Recipe
from isotune.data.documents import Documents
from sft_sides.material import ROW_TOKENS, facts_of_training, geometry, rows_of_a_round, shipped_recipe
from sft_sides.process import Metronome

SAME_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip
SAME_ADAPTER = ("r", "lora_alpha", "lora_dropout", "target_modules")


class OwnLossTrainer(SFTTrainer):
    """TRL with the model's own loss, by the override that TRL's deprecation of compute_loss_func advises."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):  # type: ignore[override]  (as Trainer calls it)
        """The stock Trainer's; TRL's own too turns the cache off."""
        inputs["use_cache"] = False
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def run(metronome: Metronome, side: str, mode: str, given: Namespace, scratch: str) -> None:
    """Train until the metronome ends it."""
    recipe = shipped_recipe(mode, side, given, scratch)
    tokenizer, data, alone = rows_of_a_round(recipe, given)
    rows = [packed_row(data.documents, data.rows[number]) for number in range(len(data.rows))]
    os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "false"  # every row has the same length
    args = SFTConfig(**same_arguments(recipe, given), torch_compile=side == "trl_compiled")
    torch.manual_seed(recipe.seed)
    trainer = (SFTTrainer if side == "trl_stock" else OwnLossTrainer)(
        model=AutoModelForCausalLM.from_config(geometry(given), dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter_of(recipe) if mode == "lora" else None,
    )
    assert trainer.padding_free, "TRL runs packed rows without padding"

    @torch.no_grad()
    def facts() -> dict[str, Any]:
        model: Any = trainer.model_wrapped
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # what is compiled is the training pass
            one = trainer._prepare_inputs(trainer.data_collator([packed_row(data.documents, [alone])]))
            loss: Any = trainer.compute_loss(model, one)
        labels = trainer.data_collator(rows)["labels"]
        return facts_of_training(loss.item(), labels.numel(), int((labels != -100).sum()))

    class Hold(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            metronome.beat(facts)

    trainer.add_callback(Hold())
    trainer.train()


def same_arguments(recipe: Recipe, given: Namespace) -> dict[str, Any]:
    """SFTConfig's fields: the recipe's, for rows that are packed already."""
    return {
        **{name: recipe.training_arguments[name] for name in SAME_ARGUMENTS},
        "output_dir": recipe.output_dir,
        "max_steps": recipe.max_steps,
        "seed": recipe.seed,
        "per_device_train_batch_size": given.rows_per_pass,
        "gradient_accumulation_steps": given.rows_per_step // given.rows_per_pass,
        "max_length": ROW_TOKENS,
        "packing": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "gradient_checkpointing": given.gradient_checkpointing,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def adapter_of(recipe: Recipe) -> LoraConfig:
    """The recipe's adapter."""
    return LoraConfig(task_type="CAUSAL_LM", **{name: getattr(recipe, name) for name in SAME_ADAPTER})


def packed_row(documents: Documents, numbers: Iterable[int]) -> dict[str, list[int]]:
    """Documents end to end; a label is the token itself, or -100 where it is not supervised."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for number in numbers:
        span = slice(int(documents.starts[number]), int(documents.starts[number + 1]))
        tokens = documents.input_ids[span].tolist()
        row["input_ids"] += tokens
        row["labels"] += [t if s else -100 for t, s in zip(tokens, documents.supervised[span].tolist(), strict=True)]
        row["seq_lengths"].append(len(tokens))
    return row
