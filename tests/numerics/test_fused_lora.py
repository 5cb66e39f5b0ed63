"""The fused LoRA branch against peft's own forward."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from isotune.models.cpu.layers import fuse_lora
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments, quantised_drop


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def _adapted(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["up", "down"], **options}
    model = get_peft_model(_Network().to(dtype), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def _run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert x.grad is not None
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 4
    return [out.detach(), x.grad, *gradients]


def _input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_a_model_may_change_its_output_in_place():
    """As Llama 4 does, which adds the experts' output to the shared expert's."""
    model = _adapted()
    layer, x = model.get_submodule("base_model.model.up"), _input(1, 30, 24)
    found = []
    for fused in (False, True):
        assert not fused or fuse_lora(model) == 2
        model.zero_grad()
        own = x.clone().requires_grad_()
        out = layer(own)
        out.mul_(2).add_(own.sum(dim=-1, keepdim=True))
        out.square().sum().backward()
        grads = [p.grad for name, p in layer.named_parameters() if "lora_" in name]
        found.append([out.detach(), own.grad, *grads])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("shape", [(1, 30, 24), (30, 24)])
def test_outputs_and_gradients_are_pefts_in_fp32(shape: tuple[int, ...], use_rslora: bool):
    model, x = _adapted(use_rslora=use_rslora), _input(*shape)
    expected = _run(model, x)
    assert fuse_lora(model) == 2
    for one, other in zip(_run(model, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_bf16_under_autocast_is_no_further_from_the_truth_than_peft():
    x, exact = _input(1, 200, 24), _adapted()
    truth = _run(exact, x)
    model = _adapted(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    truth = _run(exact, x)
    errors = []
    for fused in (False, True):
        if fused:
            fuse_lora(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = _run(model, x.bfloat16())
        errors.append([((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)])
    for peft, ours in zip(*errors, strict=True):
        assert ours <= 1.2 * peft


def test_dropout_is_applied_to_the_adapters_input_alone_and_gradients_follow_its_mask():
    model = _adapted(lora_dropout=0.5).double()
    fuse_lora(model)
    x = _input(6, 24).double().requires_grad_()

    def run(value: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        return model(value)

    trained = [p for p in model.parameters() if p.requires_grad]
    layer = model.base_model.model.up
    with training_microbatch(MicrobatchDocuments([5, 3], [2, 4])):
        assert torch.autograd.gradcheck(run, (x, *trained))
        outs = torch.stack([model(x).detach() for _ in range(1000)])
        ups = torch.stack([layer(x).detach() for _ in range(1000)])
    plain = layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    assert outs.std(0).min() > 0
    assert ((ups.mean(0) - plain).abs() / (ups.std(0) / 1000**0.5)).max() < 6.0
    assert quantised_drop(0.5)[1] == 2.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_masks_again(reentrant: bool):
    model, x = _adapted(lora_dropout=0.3), _input(1, 20, 24).requires_grad_()
    fuse_lora(model)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        with training_microbatch(MicrobatchDocuments([5, 3], [8, 12])):
            out = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            out.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_evaluation_and_frozen_inputs_work():
    model, x = _adapted(lora_dropout=0.3).eval(), _input(1, 20, 24)
    with torch.no_grad():
        expected = model(x)
        fuse_lora(model)
        torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()  # the input needs no gradient, the adapters do
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_merged_and_disabled_adapters_and_fp32_adapters_without_autocast_are_left_to_peft():
    model, x = _adapted().eval(), _input(1, 20, 24)
    expected = model(x)
    fuse_lora(model)
    with model.disable_adapter():
        without = model(x)
    assert torch.equal(without, model.get_base_model().down.base_layer(
        torch.relu(model.get_base_model().up.base_layer(x))
    ))  # fmt: skip
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    half, reference = _adapted(torch.bfloat16).eval(), _adapted(torch.bfloat16).eval()
    fuse_lora(half)
    assert torch.equal(half(x.bfloat16()), reference(x.bfloat16()))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_adapters_keep_pefts_forward(options: dict[str, bool]):
    assert fuse_lora(_adapted(**options)) == 0


def test_a_second_adapter_switches_to_pefts_forward():
    model, x = _adapted().eval(), _input(1, 20, 24)
    fuse_lora(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.set_adapter("other")
    layer = model.base_model.model.up
    assert torch.equal(layer(x), layer.stock_forward(x))
