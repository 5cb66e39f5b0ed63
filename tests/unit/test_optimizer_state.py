"""What an optimizer keeps is put back as it was, so that its next steps are those of one that never stopped."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from isotune.checkpoint.engine_state import OptimizerState, TorchState


def narrow() -> nn.Sequential:
    """Weights [1, 5] and [5, 1], whose factors have as many elements as they, and [1, 1]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 5), nn.Linear(5, 1), nn.Linear(1, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()


def as_earlier_versions_wrote_it(state: OptimizerState, model: nn.Module) -> OptimizerState:
    """Tensors with as many elements as their parameter were slots, whatever their shape."""
    for name, parameter in model.named_parameters():
        for key, (shape, dtype) in list(state.others.get(name, {}).items()):
            if torch.Size(shape).numel() == parameter.numel():
                del state.others[name][key]
                state.slots.setdefault(name, {})[key] = dtype
    return state


@pytest.mark.parametrize("earlier", [False, True])
def test_factors_as_long_as_their_parameter_go_on_to_the_bit(earlier: bool):
    whole, first, second = narrow(), narrow(), narrow()
    train(whole, Adafactor(whole.parameters()), range(6))
    stopped = Adafactor(first.parameters())
    train(first, stopped, range(3))
    saved = TorchState(first, stopped)
    record = saved.optimizer_state()
    assert {key for keys in record.slots.values() for key in keys} == {"exp_avg_sq"}  # of the biases
    if earlier:
        record = as_earlier_versions_wrote_it(record, first)
        assert record.slots["0.weight"].keys() == {"exp_avg_sq_col"}
    fresh = Adafactor(second.parameters())
    engine = TorchState(second, fresh)
    engine.make_optimizer_state(OptimizerState(**json.loads(json.dumps(dataclasses.asdict(record)))))
    written = saved.model(to_read=False) | saved.optimizer(to_read=False)
    read = engine.model(to_read=True) | engine.optimizer(to_read=True)
    assert read.keys() == written.keys()
    with torch.no_grad():
        for name, tensor in read.items():
            tensor.local.copy_(written[name].local)
    train(second, fresh, range(3, 6))
    assert all(one.equal(other) for one, other in zip(second.parameters(), whole.parameters(), strict=True))
