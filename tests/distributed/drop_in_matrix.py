"""Trains and evaluates every kind of drop-in trainer, in any launch, and writes what it found: KIND -> numbers.

python tests/distributed/drop_in_matrix.py FILE BATCH ACCUMULATION KIND...
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig
from tests.numerics.test_drop_in import STEPS, conversations, llama, texts
from tests.numerics.test_drop_in_losses import REGRESSION, bert, pairs
from torch.nn import functional
from transformers import DataCollatorWithPadding, TrainingArguments
from trl import SFTConfig

import isotune
from isotune.compat.accelerate import allow_fsdp_on_cpu
from isotune.compat.deepspeed import disable_shm_transport
from isotune.models.base.builtin import builtin_tokenizer

QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
SHARDS = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"}
TURNS = """{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}\
 .{% endgeneration %}{% else %}{{ message['content'] }} : {% endif %}{% endfor %}"""


def placed() -> dict[str, Any]:
    """Arguments by which the libraries run an engine without a GPU, for which they have none."""
    if not SHARDS & os.environ.keys():
        return {"use_cpu": True}
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        disable_shm_transport()
        PartialState(backend="gloo")
    else:
        PartialState(cpu=True, backend="gloo")
        allow_fsdp_on_cpu()
    return {"accelerator_config": {"use_configured_state": True}}


def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return functional.cross_entropy(outputs.logits, labels, outputs.logits.new_tensor([1.0, 5.0, 0.2]))


def chats() -> Dataset:
    rows = conversations()
    turns = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}, {"role": "user", "content": "more"}]
        for a, b in zip(rows["prompt"], rows["completion"], strict=True)
    ]
    return Dataset.from_dict({"messages": turns})


def sft(kind: str, shared: dict[str, Any], **more: Any) -> Any:
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    tokenizer.chat_template = TURNS if kind == "chat" else None
    args = SFTConfig(**shared, max_length=64, packing=kind != "padded", bf16=False, assistant_only_loss=kind == "chat")
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if kind == "lora" else None
    return isotune.SFTTrainer(
        model=llama(attention_dropout=0.1),
        args=args,
        train_dataset=chats() if kind == "chat" else conversations(),
        eval_dataset=chats() if kind == "chat" else conversations(7),
        processing_class=tokenizer,
        peft_config=adapter,
        **more,
    )


def classifier(kind: str, shared: dict[str, Any]) -> Any:
    data = {"regression": REGRESSION, "pairs": pairs()}.get(kind) or texts()
    return isotune.Trainer(
        model=bert(1 if kind == "regression" else 3, 0.1),
        args=TrainingArguments(**shared, seed=3),
        train_dataset=data,
        eval_dataset=data.select(range(13)),
        data_collator=DataCollatorWithPadding(builtin_tokenizer("builtin:bert-tiny")),
        compute_loss_func=weighted if kind == "own loss" else None,
    )


def main() -> None:
    """One after the other, in the processes of one launch."""
    file, batch, accumulation, *kinds = sys.argv[1:]
    found = {}
    for kind in kinds:
        shared = {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": int(batch),
            "gradient_accumulation_steps": int(accumulation),
            **QUIET,
            **STEPS,
            **placed(),
        }
        trainer = (classifier if kind in ("classes", "pairs", "regression", "own loss") else sft)(kind, shared)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        predictions = trainer.predict(trainer.eval_dataset)
        found[kind] = {
            "losses": losses,
            "norms": [float(norm) for norm in norms],
            "eval_loss": predictions.metrics["test_loss"],
            "predictions": torch.as_tensor(predictions.predictions)[:, :2].flatten(1)[:, :4].tolist(),
            "exact": trainer.plan.exact_gradients,
        }
        is_main = trainer.args.process_index == 0
        trainer.accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)  # the next one is a run of its own
        GradientState._reset_state()
    if is_main:
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
