"""Whole runs on the virtual CUDA device against the same runs on CPU, and what each step asks of the device.

The device refuses what a GPU refuses: a CPU tensor beside one of its own, fp32 in a flash kernel, int64 boundaries.
"""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isotune.models.packed_attention import DOCUMENT_SDPA, TORCH_VARLEN
from tests.building import Built, build, build_classifier, small_encoder, small_opt

# Losses and evaluation losses, relative: DESIGN's 1e-5 and 1e-3. Norms of gradients in 16 bits are rounded more often.
LOSS = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
NORM = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
OPT: dict[str, Any] = {"hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 128, "do_layer_norm_before": False}
NO_WEIGHTS_DROPPED = {"bert": "attention_probs_dropout_prob", "distilbert": "attention_dropout"}
SMALL: dict[str, Any] = {"max_steps": 3, "save_strategy": "no"}


def make(
    folder: Path, kind: str, precision: str = "fp32", tune: str = "full", models: Path | None = None, **values: Any
) -> Built:
    """A run of a kind of model, with dropout on but in the attention weights, whose masks on a GPU are its own."""
    models = (models or folder) / "model"
    values = {**SMALL, "tune": tune, **({} if precision == "fp32" else {precision: True}), **values}
    if kind in NO_WEIGHTS_DROPPED:
        config = {NO_WEIGHTS_DROPPED[kind]: values.pop("attention_dropout", 0.0)}
        return build_classifier(folder, model_name_or_path=small_encoder(models, kind, **config), **values)
    if kind == "opt":
        config = {"dropout": 0.1, "attention_dropout": values.pop("attention_dropout", 0.0)}
        config |= {name: values.pop(name) for name in ("num_hidden_layers",) if name in values}
        values["model_name_or_path"] = small_opt(models, **OPT, **config)
    values = {"global_batch_size": 3, **values}  # a microbatch each
    if tune != "full":
        values |= {"lora_dropout": 0.1}
    return build(folder, eval_dataset_name="builtin:greetings", eval_strategy="steps", eval_steps=3, **values)


def outcome(folder: str, **case: Any) -> dict[str, Any]:
    """Train; what the run wrote down, and on the virtual device what its second step asked of it."""
    from tests.virtual_cuda import device, kernels

    steps: list[device.Counts] = []
    with contextlib.ExitStack() as counted, contextlib.redirect_stdout(io.StringIO()) as printed:
        built = make(Path(folder), **case)
        stock = built.trainer.training_step

        def step(*given: Any) -> torch.Tensor:
            counted.close()
            if device.installed():
                steps.append(counted.enter_context(device.counting()))
            return stock(*given)

        built.trainer.training_step = step
        lines = built.train()
    found: dict[str, Any] = {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "norms": [line["grad_norm"] for line in lines if "loss" in line],
        "eval_losses": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "environment": json.loads((built.run.path / "environment.json").read_text()),
        "lines": lines,
        "printed": printed.getvalue(),
    }
    if steps:
        plan = built.trainer.plan.schedule
        found |= {"microbatches": len(plan.step(1).microbatches), "counts": steps[1].as_dict()}
        found["flash_backward"] = [steps[1].launches["flash_forward"], steps[1].launches["flash_backward"]]
        found["deterministic"] = kernels.was_deterministic()
    return found


def close(found: list[float], expected: list[float], tolerance: float) -> bool:
    return len(found) == len(expected) > 0 and found == pytest.approx(expected, rel=tolerance)


# kind, precision, tune; the kernel; waits a step, as counted: fp16's scaler looks at the gradient first
CASES = {
    "OPT LoRA bf16": ("opt", "bf16", "lora", TORCH_VARLEN, 1),
    "OPT full fp16": ("opt", "fp16", "full", TORCH_VARLEN, 3),
    "BERT full bf16": ("bert", "bf16", "full", TORCH_VARLEN, 1),
}
SLOW = {
    "OPT full bf16": ("opt", "bf16", "full", TORCH_VARLEN, 1),
    "OPT full fp32": ("opt", "fp32", "full", DOCUMENT_SDPA, 1),
    "DistilBERT full fp32": ("distilbert", "fp32", "full", DOCUMENT_SDPA, 1),
    "OPT LoRA fp32": ("opt", "fp32", "lora", DOCUMENT_SDPA, 1),
    "OPT QLoRA bf16": ("opt", "bf16", "qlora", TORCH_VARLEN, 1),
    "OPT LoRA fp16": ("opt", "fp16", "lora", TORCH_VARLEN, 4),
    "BERT full fp32": ("bert", "fp32", "full", DOCUMENT_SDPA, 1),
    "BERT LoRA bf16": ("bert", "bf16", "lora", TORCH_VARLEN, 1),
    "DistilBERT full bf16": ("distilbert", "bf16", "full", TORCH_VARLEN, 1),
    "DistilBERT full fp16": ("distilbert", "fp16", "full", TORCH_VARLEN, 3),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_run_is_that_of_the_cpu_and_waits_seldom(virtual, tmp_path, name: str):
    kind, precision, tune, kernel, waits = {**CASES, **SLOW}[name]
    case = {"kind": kind, "precision": precision, "tune": tune}
    check(virtual, tmp_path, case, kernel, waits)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_llama_with_grouped_heads_keeps_to_the_varlen_kernel_under_autocast(
    virtual, tmp_path, shared_data, precision
):
    model = str(shared_data / "checkpoints" / "stories260K")
    kernel, case = TORCH_VARLEN if precision == "bf16" else DOCUMENT_SDPA, {"kind": "llama", "precision": precision}
    # a learning rate at which rounding is not made larger than it is
    case |= {"model_name_or_path": model, "learning_rate": 1e-4}
    check(virtual, tmp_path, case, kernel, waits=1)


def check(
    virtual: Any, folder: Path, case: dict[str, Any], kernel: str, waits: int, run: Callable[..., Any] = outcome
) -> None:
    found, expected = virtual(run, folder=str(folder / "gpu"), **case), outcome(str(folder / "cpu"), **case)
    assert found["environment"]["device"] == "cuda" and expected["environment"]["device"] == "cpu"
    precision, counts, microbatches = case["precision"], found["counts"], found["microbatches"]
    if not close(found["losses"], expected["losses"], LOSS[precision]):
        # both round; a processor with products of its own in 16 bits may round further from fp32 than the tolerance
        exact = outcome(str(folder / "fp32"), **{**case, "precision": "fp32"})["losses"]
        sides = (expected["losses"], found["losses"])
        of_cpu, of_gpu = (max(abs(a / b - 1) for a, b in zip(side, exact, strict=True)) for side in sides)
        assert precision != "fp32" and of_gpu <= max(LOSS[precision], of_cpu), (of_gpu, of_cpu)
    assert close(found["eval_losses"], expected["eval_losses"], LOSS[precision])
    assert close(found["norms"], expected["norms"], NORM[precision])
    assert found["environment"]["in_effect"]["attention_kernel"] == kernel
    assert all((calls > 0) == (kernel == TORCH_VARLEN) for calls in found["flash_backward"])
    assert microbatches > 1
    assert sum(counts["waits"].values()) <= waits, counts["waits"]
    # one copy of all microbatches, beside the computation
    assert sum(counts["to_device"].values()) <= 1, counts["to_device"]
    assert not any("pageable" in place for place in counts["to_device"]), counts["to_device"]
