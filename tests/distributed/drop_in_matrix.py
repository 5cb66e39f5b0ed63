"""Trains and evaluates every kind of drop-in trainer, in any launch, and writes what it found: KIND -> numbers.

python tests/distributed/drop_in_matrix.py FILE isotune BATCH ACCUMULATION KIND...     24 rows, dropout on
python tests/distributed/drop_in_matrix.py FILE few BATCH ACCUMULATION KIND...         8 rows, all of them in an update
python tests/distributed/drop_in_matrix.py FILE stock BATCH ACCUMULATION KIND...       those by the library's trainers
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
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


def chats(rows: Dataset) -> Dataset:
    turns = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}, {"role": "user", "content": "more"}]
        for a, b in zip(rows["prompt"], rows["completion"], strict=True)
    ]
    return Dataset.from_dict({"messages": turns})


def spoken(rows: Dataset) -> Dataset:
    """Prompts and completions as messages."""
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in rows["prompt"]],
            "completion": [[{"role": "assistant", "content": text}] for text in rows["completion"]],
        }
    )


def written(rows: Dataset) -> Dataset:
    """Texts of which every token is learnt."""
    return Dataset.from_dict({"text": [a + b for a, b in zip(rows["prompt"], rows["completion"], strict=True)]})


FORMS = {"chat": chats, "messages": spoken, "text": written}


def sft(which: str, kind: str, shared: dict[str, Any]) -> Any:
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    tokenizer.chat_template = TURNS if kind in ("chat", "messages") else None
    # TRL keeps packed documents apart with FlashAttention alone, so the library gets each in a row of its own
    packing = kind != "padded" and which != "stock"
    args = SFTConfig(**shared, max_length=64, packing=packing, bf16=False, assistant_only_loss=kind == "chat")
    dropout, form = (0.1 if which == "isotune" else 0.0), FORMS.get(kind, lambda rows: rows)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout) if kind == "lora" else None
    return (trl.SFTTrainer if which == "stock" else isotune.SFTTrainer)(
        model=llama(attention_dropout=dropout),
        args=args,
        train_dataset=form(conversations(24 if which == "isotune" else 8)),
        eval_dataset=form(conversations(7)),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def classifier(which: str, kind: str, shared: dict[str, Any]) -> Any:
    data = {"regression": REGRESSION, "pairs": pairs()}.get(kind) or texts()
    data, held_out = data.select(range(24 if which == "isotune" else 8)), data.select(range(13))
    return (transformers.Trainer if which == "stock" else isotune.Trainer)(
        model=bert(1 if kind == "regression" else 3, 0.1 if which == "isotune" else 0.0),
        args=TrainingArguments(**shared, seed=3),
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(builtin_tokenizer("builtin:bert-tiny")),
        compute_loss_func=weighted if kind == "own loss" else None,
    )


def main() -> None:
    """One after the other, in the processes of one launch."""
    file, which, batch, accumulation, *kinds = sys.argv[1:]
    found = {}
    for kind in kinds:
        shared = {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": int(batch),
            "gradient_accumulation_steps": int(accumulation),
            "per_device_eval_batch_size": 64,
            **QUIET,
            **STEPS,
            **placed(),
        }
        trainer = (classifier if kind in ("classes", "pairs", "regression", "own loss") else sft)(which, kind, shared)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        predictions = trainer.predict(trainer.eval_dataset)
        found[kind] = {
            "losses": losses,
            "norms": [float(norm) for norm in norms],
            "eval_loss": predictions.metrics["test_loss"],
            "predictions": torch.as_tensor(predictions.predictions)[:, :2].flatten(1)[:, :4].tolist(),
            "exact": which != "stock" and trainer.plan.exact_gradients,
        }
        is_main = trainer.args.process_index == 0
        trainer.accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)  # the next one is a run of its own
        GradientState._reset_state()
    if is_main:
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
