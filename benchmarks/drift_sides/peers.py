"""The stock trainers as their documentation uses them: several runs, one after the other, in one launch.

    PYTHONPATH=benchmarks python -m torch.distributed.run --nproc_per_node 2 -m drift_sides.peers MATERIAL RUNS.json

RUNS.json is a list of {side, dropout, batch, accumulation, steps, folder}. A run leaves in
its folder result.json (losses, grad_norms, eval_loss), model/, and documents-RANK.json: digests of the documents that
this rank saw in each update.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from drift_sides.material import OPTIMIZER, ROW_TOKENS, TOKENIZER
from isotune.models.base.builtin import builtin_tokenizer


class Watched:
    """Notes the documents of each update; changes nothing."""

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        """The stock one's batches."""
        found = super().get_batch_samples(*given, **named)  # type: ignore[misc]  (mixed into a Trainer)
        self.seen = [*getattr(self, "seen", []), [d for batch in found[0] for d in documents_of(batch)]]
        return found


class WatchedTrainer(Watched, Trainer):
    """Stock, watched."""


class WatchedSFTTrainer(Watched, SFTTrainer):
    """Stock, watched."""


def documents_of(batch: Any) -> list[str]:
    """A digest for each document of a padded batch, or of a packed one, where position_ids begin anew."""
    found = []
    for row, tokens in enumerate(batch["input_ids"]):
        if "attention_mask" in batch:
            found.append(tokens[batch["attention_mask"][row].bool()])
        else:
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            found += [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    return [hashlib.sha256(document.cpu().numpy().tobytes()).hexdigest()[:12] for document in found]


def main() -> None:
    """Every run in its turn."""
    material, runs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for run in runs:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train(run, material)


def train(run: dict[str, Any], material: Path) -> None:
    """One run of one side."""
    folder = Path(run["folder"])
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": run["steps"], "per_device_train_batch_size": run["batch"],
        "gradient_accumulation_steps": run["accumulation"], "logging_steps": 1, "logging_first_step": True,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, **OPTIMIZER,
    }  # fmt: skip
    set_seed(OPTIMIZER["seed"])
    build = build_trl if run["side"].startswith("trl") else build_transformers
    trainer = build(run, material, settings)
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1")), "the processes do not know each other"
    trainer.train()
    evaluation = trainer.evaluate()
    rank = trainer.args.process_index
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"documents-{rank}.json").write_text(json.dumps(trainer.seen[: run["steps"]]))
    if rank == 0:
        steps = [line for line in trainer.state.log_history if "grad_norm" in line]
        result = {"losses": [s["loss"] for s in steps], "grad_norms": [float(s["grad_norm"]) for s in steps]}
        (folder / "result.json").write_text(json.dumps(result | {"eval_loss": evaluation["eval_loss"]}))
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / "model")
    if torch.distributed.is_initialized():  # noqa: TID251 - a peer has its own ranks
        trainer.accelerator.wait_for_everyone()


def build_trl(run: dict[str, Any], material: Path, settings: dict[str, Any]) -> Any:
    """SFTTrainer on a column `text`, packed (padding-free, best fit decreasing, as it comes) or not."""
    return WatchedSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(material / f"causal-dropout_{run['dropout']}"),
        args=SFTConfig(**settings, packing=run["side"] == "trl_packed", max_length=ROW_TOKENS),
        train_dataset=Dataset.from_list(texts(material, "train")),
        eval_dataset=Dataset.from_list(texts(material, "test")),
        processing_class=builtin_tokenizer(TOKENIZER),
    )


def build_transformers(run: dict[str, Any], material: Path, settings: dict[str, Any]) -> Any:
    """Trainer on batches padded by the collator of the task."""
    tokenizer = builtin_tokenizer(TOKENIZER)
    causal = run["side"] == "trainer_causal"
    auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    data = {}
    for split in ("train", "test"):
        rows = [dict(tokenizer(row["text"], truncation=True, max_length=ROW_TOKENS)) for row in texts(material, split)]
        if not causal:
            labels = json.loads((material / f"{split}_labels.json").read_text())
            rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
        data[split] = Dataset.from_list(rows)
    return WatchedTrainer(
        model=auto.from_pretrained(
            material / f"{'causal' if causal else 'classifier'}-dropout_{run['dropout']}",
        ),
        args=TrainingArguments(**settings),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)
        if causal
        else DataCollatorWithPadding(tokenizer),
    )


def texts(material: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split."""
    return [json.loads(line) for line in (material / f"{split}.jsonl").read_text("utf-8").splitlines()]


if __name__ == "__main__":
    main()
