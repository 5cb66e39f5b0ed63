"""Integer sums of gradients: equal to exact arithmetic, the same in every order, and never wrapped around unseen."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from isotune.io.errors import RunFault
from isotune.training.exact_gradients import LARGEST, SCALE_BITS, ExactGradients

NUMBERS = 257


def gradients_of_many_sizes(count: int, seed: int = 0) -> list[torch.Tensor]:
    """fp32 gradients from 1e-15 to 400, whose sums round in floating point."""
    generator = np.random.default_rng(seed)
    # a column keeps its size within a factor of ten, so that the smallest are not lost beside larger ones
    sizes = 10.0 ** (np.linspace(-15, 1.6, NUMBERS) + generator.uniform(0, 1, size=(count, NUMBERS)))
    return list(torch.tensor(sizes * generator.choice([-1, 1], size=sizes.shape), dtype=torch.float32))


def one_parameter(numbers: int = NUMBERS) -> nn.Linear:
    return nn.Linear(numbers, 1, bias=False)


def add(model: nn.Linear, gradient: torch.Tensor) -> None:
    """A backward pass that gives `model.weight` this gradient, by way of autograd and its hooks."""
    (model.weight * gradient).sum().backward()


def summed(gradients: list[torch.Tensor], loss_scale: float = 1.0) -> torch.Tensor:
    model = one_parameter()
    exact = ExactGradients(model)
    exact.loss_scale = loss_scale
    for gradient in gradients:
        add(model, gradient * loss_scale)
    exact.reduce()
    assert model.weight.grad is not None
    return model.weight.grad[0]


def test_the_sum_equals_exact_fractions_rounded_to_the_grid():
    gradients = gradients_of_many_sizes(9)
    found = summed(gradients)
    for column in range(NUMBERS):
        # Python rounds fractions half to even, as the grid does
        units = sum(round(Fraction(gradient[column].item()) * 2**SCALE_BITS) for gradient in gradients)
        assert found[column].item() == np.float32(float(Fraction(units, 2**SCALE_BITS)))


def test_gradients_of_everyday_size_lose_less_than_fp32_itself():
    gradients = [g.clamp(-1, 1) for g in gradients_of_many_sizes(8)]
    true = torch.stack(gradients).double().sum(0)
    error = (summed(gradients).double() - true).abs()
    assert (error <= true.abs() * 2.0**-24 + 8 * 2.0 ** -(SCALE_BITS + 1)).all()


def test_any_order_of_microbatches_gives_the_same_bits_where_float_sums_differ():
    gradients = gradients_of_many_sizes(5, seed=1)
    orders = [list(order) for order in itertools.permutations(gradients)][::7]
    first = summed(orders[0])
    assert all(torch.equal(summed(order), first) for order in orders)

    def float_sum(order: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(NUMBERS)
        for gradient in order:
            total += gradient
        return total

    assert any(not torch.equal(float_sum(order), float_sum(orders[0])) for order in orders)


def test_fp16s_loss_scale_goes_in_and_comes_out_without_a_trace():
    gradients = gradients_of_many_sizes(4, seed=2)
    assert torch.equal(summed(gradients, loss_scale=2.0**16), summed(gradients) * 2.0**16)


def test_a_gradient_beyond_the_range_is_refused_by_the_parameters_name():
    model = nn.ModuleDict({"small": one_parameter(), "large": one_parameter()})
    exact = ExactGradients(model)
    add(model["small"], torch.ones(NUMBERS))
    for _ in range(3):  # each fits; the sum might not
        add(model["large"], torch.full((NUMBERS,), LARGEST / 2))
    with pytest.raises(RunFault, match=r"large\.weight.*learning rate.*exact_gradients: false"):
        exact.reduce()


def test_the_largest_sum_that_is_taken_is_still_right():
    near = float(np.nextafter(np.float32(LARGEST / 2), np.float32(0)))
    assert torch.equal(summed([torch.full((NUMBERS,), near)] * 2), torch.full((NUMBERS,), 2 * near))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_no_number_comes_out_as_none(value):
    model = one_parameter()
    exact = ExactGradients(model)
    add(model, torch.ones(NUMBERS))
    assert exact.is_finite()
    broken = torch.ones(NUMBERS)
    broken[3] = value
    add(model, broken)
    assert not exact.is_finite()
    exact.reduce()
    assert model.weight.grad is not None and not model.weight.grad.isfinite().all()
    assert exact.is_finite(), "the next update begins anew"


def test_after_remove_gradients_accumulate_as_torch_does():
    model = one_parameter()
    exact = ExactGradients(model)
    add(model, torch.ones(NUMBERS))
    assert model.weight.grad is None
    exact.remove()
    add(model, torch.ones(NUMBERS))
    assert model.weight.grad is not None and torch.equal(model.weight.grad, torch.ones(1, NUMBERS))
