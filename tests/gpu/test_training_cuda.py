"""The training side on a CUDA device: the same promises as on CPU, in short."""

import json

import pytest
import torch
from tests.building import BIASES_WITHOUT_GRADIENT, Built, build, each_document, loss_of_document, small_opt
from tests.virtual_cuda.test_promises import resumed
from tests.virtual_cuda.test_training import close, outcome
from transformers import AutoModelForCausalLM

from isotune.models.packed_attention import FLASH_ATTENTION, TORCH_VARLEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

GEOMETRY = {"hidden_size": 128, "word_embed_proj_dim": 64, "ffn_dim": 256, "do_layer_norm_before": False}


def gradients_of_the_first_step(built: Built) -> dict[str, torch.Tensor]:
    built.model.zero_grad()
    built.trainer.training_step(built.model, next(iter(built.trainer.get_train_dataloader())))
    return {name: p.grad.clone() for name, p in built.model.named_parameters() if p.grad is not None}


def test_fp32_gradients_equal_a_naive_loop_over_documents(tmp_path):
    model = small_opt(tmp_path / "opt", **GEOMETRY)
    built = build(tmp_path, model_name_or_path=model)
    assert built.trainer.args.device.type == "cuda"
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").to("cuda")
    step = built.trainer.plan.schedule.step(0)
    documents = list(each_document(built.trainer.plan.documents.documents))
    for number in sorted(d for microbatch in step.microbatches for d in microbatch.documents):
        (loss_of_document(plain, *documents[number]) / step.supervised_tokens).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = gradients_of_the_first_step(built)
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        against = scale if name.endswith(BIASES_WITHOUT_GRADIENT) else gradient.norm()
        assert (found[name] - gradient).norm() <= 1e-5 * against, name


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_step_repeats_to_the_bit_with_dropout_on(tmp_path, precision):
    model = small_opt(tmp_path / "opt", **GEOMETRY, dropout=0.1)
    built = build(tmp_path, model_name_or_path=model, tune="lora", lora_dropout=0.1, **precision)
    first = gradients_of_the_first_step(built)
    torch.rand(100, device="cuda")
    second = gradients_of_the_first_step(built)
    assert all(torch.equal(second[name], gradient) for name, gradient in first.items())


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path, tune):
    found = resumed(str(tmp_path), kind="opt", precision="bf16", tune=tune)
    assert found["resumed"] and found["lines"][0] == found["lines"][1] and found["weights"][0] == found["weights"][1]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_classifiers_dropped_attention_weights_do_not_show_the_microbatch(tmp_path, kind):
    runs = [outcome(str(tmp_path / str(n)), kind=kind, attention_dropout=0.1, microbatch_tokens=n) for n in (64, 256)]
    assert close(runs[1]["losses"], runs[0]["losses"], 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device only")
def test_a_plain_process_uses_one_gpu_of_several(tmp_path):
    found = outcome(str(tmp_path), kind="opt")
    assert found["environment"]["in_effect"]["engine"] == "OPTForCausalLM"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_through_a_varlen_kernel(tmp_path, precision):
    model = small_opt(tmp_path / "opt", **GEOMETRY)
    built = build(tmp_path, model_name_or_path=model, eval_dataset_name="builtin:greetings", **{precision: True})
    lines = built.train()
    record = json.loads((built.run.path / "environment.json").read_text())
    assert record["device"] == "cuda" and record["in_effect"]["precision"] == precision
    if torch.cuda.get_device_capability() >= (8, 0):
        assert record["in_effect"]["attention_kernel"] in (FLASH_ATTENTION, TORCH_VARLEN)
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    assert losses[-1] < losses[0]
    assert all(line["peak_reserved_bytes"] >= line["peak_memory_bytes"] > 0 for line in lines if "loss" in line)
    assert [line for line in lines if "eval_loss" in line]


def test_an_fp16_overflow_is_skipped_and_counted(tmp_path):
    built = build(tmp_path, model_name_or_path=small_opt(tmp_path / "opt", **GEOMETRY), fp16=True)
    built.trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    steps = built.train()
    assert steps[0]["skipped_steps"] == 1 and steps[0]["grad_norm"] is None
    assert built.trainer.accelerator.scaler.get_scale() == 2.0 ** (40 - steps[-1]["skipped_steps"])


def test_qlora_learns(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = small_opt(tmp_path / "opt", **GEOMETRY)
    steps = build(tmp_path, model_name_or_path=model, tune="qlora", bf16=True, learning_rate=1e-2).train()
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
