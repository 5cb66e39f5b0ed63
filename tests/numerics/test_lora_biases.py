"""`bias: lora_only | all` beside LoRA trains the biases that peft trains, with the gradients of a plain loop."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.building import BIASES_WITHOUT_GRADIENT, build, each_document, loss_of_document, small_opt
from transformers import AutoModelForCausalLM, TrainerCallback

TARGETS = ["q_proj", "v_proj", "fc1"]  # so that lora_only and all differ in layers too
# of a gradient against its norm; bf16 rounds each of the 14 products on the way, to 2^-9
TOLERANCE = {"fp32": 1e-5, "bf16": 6e-2}


def stock(model: str, bias: Any) -> torch.nn.Module:
    """peft's own model, in fp32, with eager attention."""
    base = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, lora_alpha=8, bias=bias))


class Gradients(TrainerCallback):
    """Those that the first update hands to the optimizer."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("bias", "precision"),
    [
        ("lora_only", "fp32"),
        ("all", "bf16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("none", "fp32"), ("none", "bf16"), ("lora_only", "bf16"), ("all", "fp32"))
        ),
    ],
)
def test_the_biases_that_peft_trains_get_the_gradients_of_a_loop_over_documents(tmp_path, bias: str, precision: str):
    model = small_opt(tmp_path / "opt")
    adapter: dict[str, Any] = {"tune": "lora", "bias": bias, "target_modules": TARGETS, "r": 4, "lora_alpha": 8}
    values = {
        **adapter,
        "lora_dropout": 0.0,
        "init_lora_weights": False,
        "save_strategy": "no",
        "max_steps": 1,
        "max_grad_norm": 0.0,
    }
    built = build(tmp_path, model_name_or_path=model, **values, **({} if precision == "fp32" else {precision: True}))
    expected = stock(model, bias)
    expected.load_state_dict({name: p.float() for name, p in built.model.state_dict().items()})
    trained = {name for name, p in built.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in expected.named_parameters() if p.requires_grad}
    biases = {name for name in trained if name.endswith("bias")}
    assert len(biases) == {"none": 0, "lora_only": 2 * 3, "all": 2 * 8 + 1}[bias]

    found = Gradients()
    built.trainer.add_callback(found)
    built.train()
    step = built.trainer.plan.schedule.step(0)
    documents = list(each_document(built.trainer.plan.documents.documents))
    for number in sorted(d for microbatch in step.microbatches for d in microbatch.documents):
        (loss_of_document(expected, *documents[number]) / step.supervised_tokens).backward()
    gradients = dict(expected.named_parameters())
    scale = torch.stack([gradients[name].grad.norm() for name in trained]).norm()
    assert trained == set(found.by_name)
    for name, gradient in found.by_name.items():
        against = scale if name.endswith(BIASES_WITHOUT_GRADIENT) else gradients[name].grad.norm()
        assert (gradient - gradients[name].grad).norm() <= TOLERANCE[precision] * against, name
