"""A packed step's gradients are those of a loop over documents, written with transformers and nothing of ours."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.building import BIASES_WITHOUT_GRADIENT, Built, build, each_document, loss_of_document, small_opt
from torch import nn
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-5
# word_embed_proj_dim != hidden_size and norms after the blocks: the geometry of OPT-350M
LIKE_OPT_350M = {"hidden_size": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": False}


def opt(folder: Path, shared_data: Path | None = None) -> dict:
    return {"model_name_or_path": small_opt(folder / "opt", **LIKE_OPT_350M)}


def llama(folder: Path, shared_data: Path) -> dict:
    return {"model_name_or_path": str(shared_data / "checkpoints" / "stories260K"), "max_seq_length": 512}


def first_step(built: Built) -> dict:
    return next(iter(built.trainer.get_train_dataloader()))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def naive_gradients(built: Built) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step by transformers alone, document after document."""
    plain = AutoModelForCausalLM.from_pretrained(built.recipe.model_name_or_path, attn_implementation="eager")
    if isinstance(built.model, PeftModel):
        plain = get_peft_model(plain, copy.deepcopy(built.model.peft_config["default"]))
    plain.load_state_dict(built.model.state_dict())
    plain.to(built.trainer.args.device)
    step = built.trainer.plan.schedule.step(0)
    wanted = {document for microbatch in step.microbatches for document in microbatch.documents}
    documents = list(each_document(built.trainer.plan.documents.documents))
    targets = sum(int(documents[number][1].sum()) for number in wanted)
    total = 0.0
    for number in sorted(wanted):
        loss = loss_of_document(plain, *documents[number]) / targets
        loss.backward()
        total += loss.item()
    return total, gradients(plain)


@pytest.mark.parametrize(
    "exact", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["exact_gradients", "float_sums"]
)
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("geometry", [opt, llama], ids=lambda g: g.__name__)
def test_a_packed_steps_gradients_equal_a_naive_loop_over_documents(tmp_path, request, geometry, tune, exact):
    shared = request.getfixturevalue("shared_data") if geometry is llama else None
    adapter = {"tune": "lora", "lora_dropout": 0.0} if tune == "lora" else {"tune": "full"}
    built = build(tmp_path, **geometry(tmp_path, shared), **adapter, exact_gradients=exact)
    if tune == "lora":  # B starts at zero, where the gradient of A is zero whatever is wrong
        for name, parameter in built.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    step = built.trainer.plan.schedule.step(0)
    assert len(step.microbatches) >= 3 and step.documents > len(step.microbatches), (
        "several passes of several documents"
    )
    expected_loss, expected = naive_gradients(built)
    loss = built.trainer.training_step(built.model, first_step(built))
    found = gradients(built.model)
    assert loss.item() == pytest.approx(expected_loss, rel=TOLERANCE)
    assert found.keys() == expected.keys() and len(found) >= 12
    scale = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        zero_on_paper = name.endswith(BIASES_WITHOUT_GRADIENT)
        against = scale if zero_on_paper else gradient.norm()
        assert (found[name] - gradient).norm() <= TOLERANCE * against, name
        assert zero_on_paper or gradient.norm() > 0, name


@pytest.mark.parametrize("tune", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_with_counted_randomness_a_step_repeats_to_the_bit_and_another_step_draws_anew(tmp_path, tune):
    model = small_opt(tmp_path / "opt", **LIKE_OPT_350M, dropout=0.1, attention_dropout=0.1)
    adapter = {"tune": "lora", "lora_dropout": 0.1} if tune == "lora" else {"tune": "full"}
    # one step holds the whole epoch, so every step has the same documents and denominators
    built = build(tmp_path, model_name_or_path=model, **adapter, global_batch_size=80)
    inputs = first_step(built)

    def run(step: int) -> tuple[float, dict[str, torch.Tensor]]:
        built.model.zero_grad()
        loss = built.trainer.training_step(built.model, {**inputs, "step": replace(inputs["step"], number=step)})
        return loss.item(), gradients(built.model)

    loss, first = run(0)
    torch.rand(100)  # whatever draws in between has no say
    again, second = run(0)
    assert again == loss
    assert all(torch.equal(second[name], gradient) for name, gradient in first.items())
    other, third = run(1)
    assert other != loss
    assert not any(torch.equal(third[name], gradient) for name, gradient in first.items() if gradient.any())
