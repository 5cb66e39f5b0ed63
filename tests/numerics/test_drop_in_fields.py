"""Fields of TrainingArguments that a drop-in trainer honours: what a setting changes in the library, it changes here.

Eight rows and updates of eight: both trainers see the same rows in every update, whatever their order.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.numerics.test_drop_in import QUIET, bert, llama, texts
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import isotune
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer

BASE: dict[str, Any] = {"max_steps": 5, "logging_steps": 1, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 64}
COSINE: dict[str, Any] = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
PLATEAU: dict[str, Any] = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
CHECKPOINTS: dict[str, Any] = {"gradient_checkpointing": True}
# settings, and whether they change the losses; memory and speed are not to be seen here
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "warmup, decay and betas": ({"warmup_steps": 2, "weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.9}, True),
    "clipping and smoothing": ({"max_grad_norm": 0.05, "label_smoothing_factor": 0.2, **EVALUATED}, True),
    "warmup_steps": ({"warmup_steps": 3}, True),
    "warmup_steps as a share": ({"warmup_steps": 0.4}, True),
    "weight_decay": ({"weight_decay": 0.5}, True),
    "adam_beta1": ({"adam_beta1": 0.2}, True),
    "adam_beta2": ({"adam_beta2": 0.6}, True),
    "adam_epsilon": ({"adam_epsilon": 1e-3}, True),
    "max_grad_norm": ({"max_grad_norm": 0.05, "optim": "sgd"}, True),
    "max_grad_norm 0": ({"max_grad_norm": 0.0, "optim": "sgd"}, True),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.3}, True),
    "adamw_torch": ({"optim": "adamw_torch"}, False),
    "sgd": ({"optim": "sgd", "optim_args": "momentum=0.9"}, True),
    "adafactor": ({"optim": "adafactor"}, True),
    "adagrad": ({"optim": "adagrad"}, True),
    "rmsprop": ({"optim": "rmsprop"}, True),
    "cosine with restarts": (COSINE, True),
    "polynomial": ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0, "lr_end": 1e-5}}, True),
    "reduce on plateau": ({**PLATEAU, "metric_for_best_model": "eval_loss", **EVALUATED, "eval_steps": 1}, True),
    "epochs": ({"max_steps": -1, "num_train_epochs": 3.0}, True),
    "gradient_checkpointing": (CHECKPOINTS, False),
    "reentrant": ({**CHECKPOINTS, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, False),
    "every second layer": ({**CHECKPOINTS, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}, False),
    "offloaded": ({**CHECKPOINTS, "gradient_checkpointing_kwargs": {"offload": True}}, False),
    "bf16": ({"bf16": True}, True),
    "full_determinism": ({"full_determinism": True}, False),
    "tokens seen": ({"include_num_input_tokens_seen": "non_padding"}, False),
    "no effect": ({"dataloader_num_workers": 2, "torch_empty_cache_steps": 1, "eval_accumulation_steps": 1}, False),
    "logging and evaluation": (
        {"logging_first_step": True, "logging_steps": 2, **EVALUATED, "eval_on_start": True, "eval_delay": 3}, False
    ),
    "by epochs": (
        {"eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, True
    ),
}  # fmt: skip
IN_SHORT = ("logging and evaluation",)
COMPARED = ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "step", "num_input_tokens_seen")


def history(kind: Any, folder: Path, settings: dict[str, Any]) -> list[dict[str, float]]:
    args = TrainingArguments(str(folder), **{**QUIET, **BASE, **settings})
    rows = texts(8)
    trainer = kind(
        model=bert(),
        args=args,
        train_dataset=rows,
        eval_dataset=texts(13, seed=1),
        processing_class=builtin_tokenizer("builtin:bert-tiny"),
    )
    trainer.train()
    return [{name: line[name] for name in COMPARED if name in line} for line in trainer.state.log_history]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return history(isotune.Trainer, tmp_path_factory.mktemp("base"), {})


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="the library offloads into pinned memory of a GPU")


def case(name: str) -> Any:
    marks = [] if name in IN_SHORT else [pytest.mark.slow]
    return pytest.param(name, marks=[*marks, ON_GPU] if name == "offloaded" else marks)


@pytest.mark.parametrize("name", [case(name) for name in SETTINGS])
def test_a_setting_changes_what_it_changes_in_the_library(name: str, base: list[dict[str, float]], tmp_path: Path):
    settings, changes = SETTINGS[name]
    ours, theirs = (history(kind, tmp_path, settings) for kind in (isotune.Trainer, transformers.Trainer))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    rounding = 2e-2 if settings.get("bf16") else 1e-5
    smoothed = "label_smoothing_factor" in settings  # of training alone: an evaluation has none, so that runs compare
    for own, other in zip(ours, theirs, strict=True):
        for key in own:
            if not (smoothed and key == "eval_loss"):
                assert own[key] == pytest.approx(other[key], rel=rounding, abs=1e-9), (key, own, other)
    if changes:
        seen, default = ([line["loss"] for line in lines if "loss" in line] for lines in (ours, base))
        assert seen != default


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 1])
def test_checkpoints_are_those_that_the_library_keeps(limit: int | None, tmp_path: Path):
    found = []
    for kind in (isotune.Trainer, transformers.Trainer):
        folder = tmp_path / kind.__module__.partition(".")[0]
        history(kind, folder, {"save_strategy": "steps", "save_steps": 2, "save_total_limit": limit})
        found.append({file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()})
        saved = torch.load(Path(str(get_last_checkpoint(str(folder)))) / "training_args.bin", weights_only=False)
        assert saved.max_steps == 5
    assert found[0] == found[1] and "checkpoint-5/optimizer.pt" in found[0]


def test_the_saved_arguments_are_those_that_were_given(tmp_path):
    given = {"gradient_accumulation_steps": 4, "neftune_noise_alpha": 3.0, "per_device_train_batch_size": 2}
    args = TrainingArguments(str(tmp_path), **QUIET, **given)
    trainer = isotune.Trainer(model=bert(), args=args, train_dataset=texts(8))
    trainer.save_model()
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert {name: getattr(saved, name) for name in given} == given and saved.average_tokens_across_devices
    assert trainer.args.gradient_accumulation_steps == 1 and trainer.plan.schedule.global_batch_size == 8


def test_what_has_no_effect_is_named_once(tmp_path, capsys):
    args = TrainingArguments(str(tmp_path), dataloader_num_workers=2, per_device_eval_batch_size=3, **QUIET)
    trainer = isotune.Trainer(model=bert(), args=args, train_dataset=texts(8))
    names = "per_device_eval_batch_size, dataloader_num_workers"
    assert capsys.readouterr().out.count(f"note        {names}: no effect here") == 1
    assert f"no effect   {names}" in isotune.describe(trainer)
    isotune.Trainer(model=bert(), args=TrainingArguments(str(tmp_path), **QUIET), train_dataset=texts(8))
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optim": "galore_adamw_layerwise"}, "optim: galore_adamw_layerwise: it updates in the backward"),
        ({"optim": "apollo_adamw_layerwise", "gradient_accumulation_steps": 2}, "say apollo_adamw$"),
        ({"ddp_static_graph": True}, "ddp_static_graph: True: a rank may run an empty microbatch"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches: False: there is one table"),
    ],
)
def test_a_setting_that_would_be_silently_wrong_is_refused(settings: dict[str, Any], sentence: str, tmp_path):
    args = TrainingArguments(str(tmp_path), **QUIET, **settings)
    with pytest.raises(UserError, match=sentence):
        isotune.Trainer(model=bert(), args=args, train_dataset=texts(8))


def test_a_batch_that_is_split_over_the_processes_is_the_rows_of_an_update(tmp_path, monkeypatch):
    monkeypatch.setattr("isotune.drop_in.trainer.world_size", lambda: 2)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    for split, rows in ((True, 4), (False, 8)):
        config = {"split_batches": split}
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, accelerator_config=config, **QUIET)
        assert isotune.Trainer(bert(), args, train_dataset=texts()).global_batch_size == rows


def test_tokens_that_are_counted_without_padding_have_the_end_of_a_text_among_them(tmp_path):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    tokenizer.pad_token = tokenizer.eos_token
    rows = texts(8).remove_columns("label").map(lambda row: {"input_ids": [*row["input_ids"], tokenizer.eos_token_id]})
    settings = {**QUIET, **BASE, "max_steps": 1, "include_num_input_tokens_seen": "non_padding"}
    args = TrainingArguments(str(tmp_path), **settings)
    trainer = isotune.Trainer(llama(), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(map(len, rows["input_ids"]))
