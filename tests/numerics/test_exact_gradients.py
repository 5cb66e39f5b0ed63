"""Integer sums of gradients: equal to exact arithmetic, the same in every order, and never wrapped around unseen."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from isotune.io.errors import RunFault
from isotune.training.gradients.exact_gradients import (
    CPU_CHUNK,
    LARGEST,
    SCALE_BITS,
    SQUARE_BITS,
    ExactGradients,
    clip_exactly,
    digit_sums,
    exact_norm,
)

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


def on_the_grid(tensor: torch.Tensor) -> torch.Tensor:
    """fp32, as a summed gradient is: rounded to multiples of 2^-50."""
    return (tensor.double() * 2.0**SCALE_BITS).round().mul(2.0**-SCALE_BITS).float()


def norm_of(tensors: list[torch.Tensor]) -> float:
    return clip_exactly([tensor.clone() for tensor in tensors], math.inf, add_ranks=False)


@pytest.mark.parametrize(
    "sizes", [(NUMBERS,), (1, 3, 0, NUMBERS), (2 * CPU_CHUNK + 5,), (CPU_CHUNK - 1, CPU_CHUNK + 1, 7)]
)
def test_the_norm_is_that_of_the_exact_sum_of_squares(sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    draw = lambda n: torch.randn(n, generator=generator) * 10 ** torch.empty(n).uniform_(-14, 3, generator=generator)  # noqa: E731
    tensors = [on_the_grid(draw(size).clamp(-LARGEST + 1, LARGEST - 1)) for size in sizes]
    # squares of fp32 numbers are exact in float64, and fsum rounds their exact sum once
    squares = torch.cat(tensors).double().square().tolist()
    assert norm_of(tensors) == math.sqrt(math.fsum(squares)) > 0


@pytest.mark.parametrize("value", [2.0**-SCALE_BITS, math.nextafter(LARGEST, 0)])
def test_the_norm_of_the_smallest_and_the_largest_gradients_is_exact(value):
    value = np.float32(value) if value < 1 else np.nextafter(np.float32(LARGEST), np.float32(0))
    assert norm_of([torch.full((2**16,), float(value))]) == 2.0**8 * float(value)


def test_any_split_gives_the_same_norm_where_torchs_differs():
    gradient = on_the_grid(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    splits = [list(gradient.split(size)) for size in (5000, 1700, 64, 1)] + [[gradient.flip(0).view(50, 100)]]
    assert len({norm_of(split) for split in splits}) == 1
    assert len({float(nn.utils.get_total_norm(split)) for split in splits}) > 1


@pytest.mark.parametrize(("max_norm", "size"), [(0.5, 1.0), (1e6, 1.0), (2e-6, 1e-6)])
def test_clipping_is_torchs(max_norm, size):
    gradients = [on_the_grid(size * torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in (3, 1000)]
    clipped = [gradient.clone() for gradient in gradients]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    theirs = nn.utils.clip_grad_norm_(parameters, max_norm)
    assert clip_exactly(clipped, max_norm, add_ranks=False) == pytest.approx(theirs.item(), rel=1e-6)
    for ours, parameter, gradient in zip(clipped, parameters, gradients, strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-6, atol=0)
        assert torch.equal(ours, gradient) is (max_norm == 1e6)


def test_max_norm_0_clips_nothing():
    model = one_parameter()
    exact = ExactGradients(model)
    add(model, torch.full((NUMBERS,), 3.0))
    exact.reduce()
    assert exact.clip(0.0) == math.sqrt(9 * NUMBERS)
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.full((1, NUMBERS), 3.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_without_a_number_is_nan_and_scales_nothing(value):
    gradients = [torch.tensor([1e3, 1e3]), torch.tensor([1.0, value])]
    assert math.isnan(clip_exactly(gradients, 1.0, add_ranks=False))
    assert gradients[0].tolist() == [1e3, 1e3]


@pytest.mark.parametrize("value", [2.0**-SCALE_BITS, (2**24 - 1) * 2.0**-SCALE_BITS, 2.0**-20, 1.0, 3.7, LARGEST / 2.5])
def test_the_digits_of_a_square_add_up_to_it_and_each_has_32_bits(value: float):
    value = on_the_grid(torch.tensor([value]))
    digits = digit_sums([value])
    assert digits.shape == (4,) and digits.dtype == torch.float64
    assert sum(Fraction(digit) for digit in digits.tolist()) == Fraction(value.item()) ** 2
    rest = Fraction(value.item()) ** 2
    for digit, unit in zip(digits.tolist(), (2.0**-8, 2.0**-40, 2.0**-72, 2.0**-SQUARE_BITS), strict=True):
        assert digit % unit == 0.0 and abs(digit) <= 2.0**32 * unit
        rest -= Fraction(digit)
        assert abs(rest) <= Fraction(unit) / 2


@pytest.fixture
def two_ranks():
    """This process is the first of two ranks, of which the other is not there: a sum is what this one gives."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("exponent", [-SQUARE_BITS, -40, -8, 0, 24, 55, 80])
def test_ranks_add_up_the_whole_sum_of_squares(two_ranks, exponent: int):
    """Sums of any size survive being cut into the words that ranks add; test_world_sizes.py has real ranks."""
    digits = [2.0**exponent, 0.0 if exponent == -SQUARE_BITS else 2.0**-SQUARE_BITS]
    alone = exact_norm(digits, torch.device("cpu"), add_ranks=False)
    assert alone == math.sqrt(Fraction(digits[0]) + Fraction(digits[1])) > 0
    assert exact_norm(digits, torch.device("cpu"), add_ranks=True) == alone
    assert math.isnan(exact_norm([1.0, math.nan], torch.device("cpu"), add_ranks=True))


def test_ranks_add_what_each_of_them_has_and_nothing_where_all_have_everything(two_ranks, monkeypatch):
    """The other rank is one that has the same: a sum over the ranks is twice what this one gives."""
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: asked.append(tensor.mul_(2)))
    model = one_parameter(3)
    exact = ExactGradients(model)
    add(model, torch.tensor([1.0, -2.0, 0.5]))
    assert exact.add_ranks().tolist() == [2 * 2.0]
    assert exact.gradients()[0].tolist() == [[2.0, -4.0, 1.0]] and len(asked) == 2
    model.weight.grad = None
    exact.shards = True  # an engine has added them up already
    add(model, torch.tensor([1.0, -2.0, 0.5]))
    exact.add_ranks()
    assert exact.gradients()[0].tolist() == [[1.0, -2.0, 0.5]] and len(asked) == 3
    assert exact_norm([4.0], torch.device("cpu"), add_ranks=False) == 2.0 and len(asked) == 3
    assert exact_norm([4.0], torch.device("cpu"), add_ranks=True) == math.sqrt(8.0) and len(asked) == 4


@pytest.mark.parametrize("max_norm", [5.0, 5.1, 7.5, 9.9])
def test_a_gradient_below_the_bound_is_left_as_it_is(max_norm: float):
    gradient = torch.tensor([3.0, 4.0])
    assert clip_exactly([gradient], max_norm + 1e-5, add_ranks=False) == 5.0
    assert gradient.tolist() == [3.0, 4.0]


def test_nothing_has_the_norm_zero():
    empty = [torch.zeros(0)]
    assert digit_sums(empty).tolist() == [] and clip_exactly(empty, 1.0, add_ranks=False) == 0.0


def test_the_sums_of_an_update_are_forgotten_with_it():
    model = one_parameter()
    exact = ExactGradients(model)
    found = []
    for _ in range(2):
        add(model, torch.full((NUMBERS,), 3.0))
        exact.reduce()
        assert model.weight.grad is not None
        found.append(model.weight.grad.clone())
        model.weight.grad = None
    assert torch.equal(*found) and torch.equal(found[0], torch.full((1, NUMBERS), 3.0))


def test_the_bound_is_the_sum_of_the_largest_of_each_microbatch():
    model = one_parameter(3)
    exact = ExactGradients(model)
    exact.loss_scale = 4.0
    for gradient in ([8.0, -20.0, 1.0], [12.0, 4.0, 0.0]):
        add(model, torch.tensor(gradient))
    assert exact.add_ranks().tolist() == [(20.0 + 12.0) / 4.0]
    assert exact.gradients()[0].tolist() == [[20.0, -16.0, 1.0]]
