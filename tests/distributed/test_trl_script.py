"""TRL's own script, with the one import changed, on a model and a data set in folders, as its users call it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.launching import launcher, run_command
from tests.numerics.test_drop_in import conversations, llama
from transformers import AutoModelForCausalLM

from isotune.models.base.builtin import builtin_tokenizer

SCRIPT = "tests/distributed/trl_script.py"
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("trl")
    llama(attention_dropout=0.1).save_pretrained(folder / "model")
    builtin_tokenizer("builtin:opt-tiny").save_pretrained(folder / "model")
    (folder / "data").mkdir()
    conversations().to_parquet(folder / "data" / "train.parquet")
    return [
        *("--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data")),
        *("--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"),
        *("--report_to", "none", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--packing"),
        *("--max_length", "64", "--save_strategy", "no"),
    ]


def losses(arguments: list[str], output: Path, *own: str, processes: int = 0) -> list[float]:
    start = launcher("ddp.yaml", processes) if processes else [sys.executable]
    command = [*start, SCRIPT, *arguments, "--output_dir", str(output), "--save_strategy", "steps", "--save_steps", "3"]
    done = run_command([*command, *own])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


@pytest.mark.parametrize("tune", [pytest.param([], marks=pytest.mark.slow), LORA], ids=["full", "LoRA"])
def test_trls_script_has_the_same_losses_on_two_processes_and_saves_a_model_that_loads(
    tune: list[str], arguments: list[str], tmp_path
):
    split = ["--per_device_train_batch_size", "8", *tune]
    one = losses(arguments, tmp_path / "one", *split)
    two = losses(
        arguments, tmp_path / "two", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", *tune,
        processes=2,
    )  # fmt: skip
    assert len(one) == 3
    if tune:
        assert one == two  # bit for bit: exact gradients by themselves
    assert two == pytest.approx(one, rel=1e-6)
    ids = torch.arange(5, 25)[None]
    found = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        if tune:
            base = AutoModelForCausalLM.from_pretrained(arguments[1])
            model = PeftModel.from_pretrained(base, str(folder))
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            found.append(model.eval()(input_ids=ids).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
