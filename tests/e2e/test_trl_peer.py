"""Real conversations, packed by isotune and unpacked by TRL: the same losses, step for step, and the same learning.

TRL's packing leaks on OPT (tests/numerics/test_isolation.py), so the peer pads instead. It gets this project's token
ids and labels, since it would supervise the prompts of `text` rows too.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tests.building import Built, build, each_document
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from isotune.data.documents import Documents

STEPS = 20
TOLERANCE = 1e-4
LEARNING_RATE = 2e-3
IGNORED = -100


@pytest.fixture
def opt_of_millions(tmp_path, shared_data) -> str:
    """OPT's real tokenizer and vocabulary on a geometry of 3.9 million parameters, with project_in and project_out."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "opt")
    torch.manual_seed(3)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=50272,
            word_embed_proj_dim=64,
            hidden_size=128,
            ffn_dim=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            do_layer_norm_before=False,
            dropout=0.0,
            attention_dropout=0.0,
        )
    )
    model.save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


def ours(folder: Path, model: str, shared_data: Path) -> Built:
    return build(
        folder,
        model_name_or_path=model,
        dataset_name=str(shared_data / "guanaco" / "train.jsonl"),
        eval_dataset_name=str(shared_data / "guanaco" / "test.jsonl"),
        max_seq_length=64,
        microbatch_tokens=256,  # all rows of a step in one pass
        overlong="truncate",
        global_batch_size=4,
        tune="full",
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim="adamw_torch",
        eval_strategy="steps",
        eval_steps=STEPS,
        eval_on_start=True,
        eval_microbatch_tokens=1024,
    )


def as_dataset(documents: Documents) -> Any:
    from datasets import Dataset

    rows = [
        {"input_ids": ids.tolist(), "labels": ids.where(supervised, torch.tensor(IGNORED)).tolist()}
        for ids, supervised in each_document(documents)
    ]
    return Dataset.from_list(rows)


def theirs(folder: Path, model: str, built: Built) -> list[dict[str, Any]]:
    """TRL's SFTTrainer over the documents of the same steps, padded; returns its log."""
    from torch.utils.data import DataLoader
    from trl import SFTConfig, SFTTrainer

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    schedule, data = built.trainer.plan.schedule, built.trainer.plan.documents.documents
    steps = [[d for m in schedule.step(number).microbatches for d in m.documents] for number in range(STEPS)]

    class SameSteps(SFTTrainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_sampler=steps, collate_fn=self.data_collator)

    trainer = SameSteps(
        model=AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa"),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_length=None,
            packing=False,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=4,
            weight_decay=0.01,
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=False,
            gradient_checkpointing=False,
            per_device_eval_batch_size=1,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=as_dataset(data),
        processing_class=built.tokenizer,
    )
    held_out = list(each_document(built.trainer.plan.evaluation.documents))
    before = supervised_loss(trainer.model, held_out)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    return [*log, {"before": before, "after": supervised_loss(trainer.model, held_out)}]


@torch.no_grad()
def supervised_loss(model: Any, documents: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss over all supervised tokens, by the model's own forward and labels over single documents."""
    model.eval()
    losses, targets = [], 0
    for ids, supervised in documents:
        labels = ids.where(supervised, torch.tensor(IGNORED)).to(model.device)
        count = int(supervised.sum())
        mean = model(input_ids=ids[None].to(model.device), labels=labels[None]).loss
        losses.append(mean.item() * count)
        targets += count
    model.train()
    return math.fsum(losses) / targets


@pytest.mark.slow
def test_twenty_steps_on_guanaco_agree_with_trls_unpacked_run_and_both_learn(tmp_path, opt_of_millions, shared_data):
    built = ours(tmp_path, opt_of_millions, shared_data)
    lines = built.train()
    first = built.trainer.plan.schedule.step(0)
    assert first.documents > len(first.microbatches), "a pass holds several documents, or nothing is shown"
    *peer, evaluation = theirs(tmp_path, opt_of_millions, built)
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == len(peer) == STEPS
    for a, b in zip(steps, peer, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE), a["step"]
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-6)
    assert steps[0]["grad_norm"] == pytest.approx(peer[0]["grad_norm"], rel=TOLERANCE)
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluations[0] == pytest.approx(evaluation["before"], rel=1e-5)
    assert evaluations[-1] == pytest.approx(evaluation["after"], rel=TOLERANCE)
    assert evaluations[-1] < evaluations[0] - 1.0, "a nat a token below the loss of chance"
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(steps, peer, strict=True))
    print(f"largest relative difference of a step loss {worst:.1e}, evaluation {evaluations}, TRL {evaluation}")
