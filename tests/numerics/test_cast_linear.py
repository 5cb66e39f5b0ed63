"""Linear layers that keep no 16-bit weights against autocast's own, bit for bit."""

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from isotune.models.cpu import layers
from isotune.models.cpu.functional import linear
from isotune.models.cpu.layers import cast_linear_layers, cast_once, forget_cast

TYPES = (torch.bfloat16, torch.float16)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(24, 40), nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.left(x)) * self.right(x))


def _run(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, recompute: bool = False) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        hidden = x * 1.0  # as within a model: of a leaf autocast would keep its cast
        out = checkpoint(model, hidden, use_reentrant=False) if recompute else model(hidden)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


def _network() -> nn.Module:
    torch.manual_seed(0)
    return _Network()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 30, 24), (30, 24)])
def test_outputs_and_gradients_are_autocasts_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype, recompute: bool):
    model, x = _network(), torch.randn(*shape)
    expected = _run(model, x, dtype)
    assert cast_linear_layers(model) == 3
    found = _run(model, x, dtype, recompute)
    assert found.keys() == expected.keys() and len(found) == 7
    for name, tensor in found.items():
        if "bias" in name:  # summed in fp32 here, and rounded to 16 bits there
            torch.testing.assert_close(tensor, expected[name], rtol=2.0**-7, atol=0.0)
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 24, 40), (257, 768, 3072), (2, 100, 512, 1000)])
def test_a_bias_added_in_passing_changes_no_bit(shape: tuple[int, ...], dtype: torch.dtype):
    rows, weight, bias = (torch.randn(*size).to(dtype) for size in (shape[:-1], shape[:-3:-1], shape[-1:]))
    assert torch.equal(linear(rows, weight, bias), functional.linear(rows, weight, bias))
    across = rows.transpose(0, -2) if rows.dim() > 2 else rows
    assert torch.equal(linear(across, weight, bias), functional.linear(across, weight, bias))


def test_no_copy_of_the_weights_waits_for_the_backward_pass():
    def waiting(model: nn.Module) -> list[tuple[int, ...]]:
        saved = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
        with keep, torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(8, 24, requires_grad=True))
        return [tuple(t.shape) for t in saved if t.dtype == torch.bfloat16 and tuple(t.shape) != (8, 24)]

    model = _network()
    weights = {(40, 24), (24, 40)}
    assert weights & set(waiting(model))
    cast_linear_layers(model)
    assert not weights & set(waiting(model))


def test_without_autocast_and_without_gradients_the_layers_own_forward_runs(monkeypatch: pytest.MonkeyPatch):
    model, x = _network(), torch.randn(3, 24)
    expected = model(x)
    cast_linear_layers(model)
    monkeypatch.setattr(layers._CastLinear, "apply", None)  # calling it would fail
    assert torch.equal(model(x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)


def test_frozen_layers_are_left_alone():
    model = _network()
    model.get_submodule("left").requires_grad_(False)
    assert cast_linear_layers(model) == 2


def test_an_input_is_cast_once_until_it_changes_or_is_forgotten():
    x = torch.randn(5, 3)
    first = cast_once(x, torch.bfloat16)
    assert torch.equal(first, x.bfloat16()) and cast_once(x, torch.bfloat16) is first
    assert cast_once(x, torch.float16).dtype == torch.float16
    second = cast_once(x, torch.bfloat16)
    x.mul_(2)
    assert torch.equal(cast_once(x, torch.bfloat16), x.bfloat16()) and not torch.equal(second, x.bfloat16())
    other = torch.randn(5, 3)
    assert torch.equal(cast_once(other, torch.bfloat16), other.bfloat16())
    forget_cast()
    gc.collect()
    assert layers._last is None
