"""Checkpoints between trainers: the library's own goes on from one of a drop-in trainer, and this from the library's.

Eight rows and updates of eight: every update sees the same rows under both, in whatever order.
"""

from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig
from tests.numerics.test_drop_in import QUIET, bert, conversations, llama, losses_of, texts
from transformers import AutoModelForSequenceClassification, TrainingArguments
from trl import SFTConfig
from trl import SFTTrainer as LibrarySftTrainer

import isotune
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer

STEPS: dict[str, Any] = {"logging_steps": 1, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
STEPS |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}  # as far as any of them goes
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
KINDS = {"ours": isotune.Trainer, "theirs": transformers.Trainer}


def trainer(kind: Any, folder: Path, steps: int, rows: int = 8, **more: Any) -> Any:
    args = TrainingArguments(str(folder), **{**QUIET, **STEPS, **SAVED, "max_steps": steps, **more.pop("args", {})})
    tokenizer = builtin_tokenizer("builtin:bert-tiny")
    return kind(model=bert(), args=args, train_dataset=texts(rows), processing_class=tokenizer, **more)


def going_on(trainer: Any, folder: Path, step: int) -> list[float]:
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("first", "second"), [("theirs", "ours"), pytest.param("ours", "theirs", marks=pytest.mark.slow)]
)
def test_a_training_goes_on_from_the_checkpoint_of_the_other_trainer(first: str, second: str, tmp_path, capsys):
    whole = losses_of(trainer(transformers.Trainer, tmp_path / "whole", 4))
    trainer(KINDS[first], tmp_path / "parts", 2).train()
    capsys.readouterr()
    parts = going_on(trainer(KINDS[second], tmp_path / "parts", 4), tmp_path / "parts", 2)
    assert parts == pytest.approx(whole, rel=1e-5) and len(parts) == 4
    assert ("is of another trainer" in capsys.readouterr().out) == (second == "ours")
    # and once more: the second has carried the first one's notes on
    third = going_on(trainer(isotune.Trainer, tmp_path / "parts", 6), tmp_path / "parts", 4)
    assert third[:4] == parts and len(third) == 6
    assert ("is of another trainer" in capsys.readouterr().out) == (second == "theirs")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "parts" / "checkpoint-4")
    assert {p.dtype for p in model.parameters()} == {next(bert().parameters()).dtype}


def test_a_checkpoint_of_updates_of_other_rows_is_refused(tmp_path):
    trainer(isotune.Trainer, tmp_path, 2, rows=24).train()
    half = trainer(isotune.Trainer, tmp_path, 4, rows=24, args={"per_device_train_batch_size": 4})
    with pytest.raises(UserError, match=r"updates of 8 rows, and this trainer has 4: say global_batch_size=8$"):
        going_on(half, tmp_path, 2)


@pytest.mark.slow
def test_a_checkpoint_of_other_rows_or_another_seed_is_named(tmp_path, capsys):
    trainer(isotune.Trainer, tmp_path, 2, rows=24).train()
    capsys.readouterr()
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for options, said in (
        ({"args": split}, False),
        ({"args": {"per_device_train_batch_size": 4}, "global_batch_size": 8}, False),
        ({"args": {"data_seed": 7}}, True),
        ({"rows": 16}, True),
        ({"args": {"restore_callback_states_from_checkpoint": True, "data_seed": 7}}, True),
    ):
        going_on(trainer(isotune.Trainer, tmp_path, 3, **{"rows": 24, **options}), tmp_path, 2)
        assert ("of other rows, or of another seed" in capsys.readouterr().out) == said, options


def lora(kind: Any, folder: Path, steps: int, rows: int = 24, dropout: float = 0.1, **args: Any) -> Any:
    arguments = {**QUIET, **STEPS, **SAVED, "max_steps": steps, "max_length": 64, "bf16": False, **args}
    return kind(
        model=llama(),
        args=SFTConfig(str(folder), **arguments),
        processing_class=builtin_tokenizer("builtin:opt-tiny"),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout),
        train_dataset=conversations(rows),
        eval_dataset=conversations(7),
    )


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_lora_goes_on_bit_for_bit_and_loads_its_best(packing: bool, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "packing": packing}
    whole = lora(isotune.SFTTrainer, tmp_path / "whole", 4, learning_rate=0.3, **evaluated)
    losses = losses_of(whole)
    assert whole.evaluate()["eval_loss"] == whole.state.best_metric
    lora(isotune.SFTTrainer, tmp_path / "parts", 2, learning_rate=0.3, packing=packing).train()
    second = lora(isotune.SFTTrainer, tmp_path / "parts", 4, learning_rate=0.3, **evaluated)
    assert going_on(second, tmp_path / "parts", 2) == losses


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("ours", "theirs"), ("theirs", "ours")])
def test_lora_goes_on_from_the_checkpoint_of_the_other_trainer(first: str, second: str, tmp_path):
    kinds = {"ours": isotune.SFTTrainer, "theirs": LibrarySftTrainer}
    whole = losses_of(lora(LibrarySftTrainer, tmp_path / "whole", 4, rows=8, dropout=0.0))
    lora(kinds[first], tmp_path / "parts", 2, rows=8, dropout=0.0).train()
    parts = going_on(lora(kinds[second], tmp_path / "parts", 4, rows=8, dropout=0.0), tmp_path / "parts", 2)
    assert parts == pytest.approx(whole, rel=1e-5) and len(parts) == 4
