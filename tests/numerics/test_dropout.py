"""Cheap dropout: right in distribution, decided by the seed alone, and the same again when recomputed."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from isotune.models.cpu.functional import (
    SHARING,
    as_mask,
    draw_kept,
    dropout,
    fast_dropout,
    mask_generator,
    masked,
    pack_kept,
    quantised_drop,
    unpack_mask,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_and_the_mean_are_as_asked(p: float):
    torch.manual_seed(0)
    count = 4_000_000
    out = dropout(torch.ones(count), p)
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs((out == 0).double().mean().item() - p) < 5 * deviation + 1 / 65536
    # the probability is rounded, but the scale follows it: the expectation is exact
    assert abs(out.double().mean().item() - 1.0) < 5 * deviation / (1 - p)
    assert abs(out.double().var().item() - p / (1 - p)) < 0.01 * p / (1 - p)


class _EveryDraw(np.random.SFC64):
    """Deals each pair of a byte and the seven bits of a bound exactly once, over 512 bounds of 64 bytes."""

    def random_raw(self, size: Any = None, output: Any = True) -> Any:
        column = np.arange(512)
        bytes_ = np.arange(SHARING)[:, None] + SHARING * (column // 128)
        drawn = np.concatenate([bytes_.ravel(), column % 128]).astype(np.uint8)
        assert drawn.nbytes == 8 * size
        return drawn.view(np.uint64)


@pytest.mark.parametrize("threshold", [0, 1, 100, 127, 128, 129, 1638, 3277, 16383, 16384, 16385, 29491, 32639, 32640,
                                       32641, 32767, 32768])  # fmt: skip
def test_of_all_draws_exactly_as_many_drop_an_element_as_the_threshold_says(threshold: int):
    kept = draw_kept((8, 4096), threshold, _EveryDraw())
    assert kept.shape == (8, 4096) and kept.dtype == torch.bool
    assert kept.sum().item() == 32768 - threshold


@pytest.mark.parametrize("p", [0.0176, 0.1, 0.5])  # of the bounds of 0.0176, half are one higher
def test_elements_are_dropped_independently(p: float):
    torch.manual_seed(1)
    count = 4_000_000
    out = dropout(torch.ones(count), p)
    kept = ((out != 0).double() - (1 - p)) / (p * (1 - p)) ** 0.5
    # eight elements share a draw, and every 62,500th a bound
    for distance in (1, 2, 3, 4, 7, 8, 64, 1024, count // SHARING, 2 * count // SHARING):
        correlation = (kept[:-distance] * kept[distance:]).mean().item()
        assert abs(correlation) < 5 / 2000


@settings(max_examples=200)
@given(p=st.floats(0.0, 1.0, allow_subnormal=False))
def test_the_scale_is_one_over_the_probability_in_effect(p: float):
    threshold, scale = quantised_drop(p)
    assert abs(threshold / 32768 - p) <= 1 / 32768
    assert threshold == 32768 or scale * (1 - threshold / 32768) == pytest.approx(1.0, rel=1e-12)
    assert (threshold == 0) == (p == 0.0) and (threshold == 32768) == (p == 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_elements_are_scaled_and_dropped_ones_are_zero(dtype: torch.dtype):
    x = torch.randn(37, 53, dtype=dtype)
    x[0, 0], x[1, 1] = float("inf"), float("nan")
    mask = as_mask(draw_kept(x.shape, quantised_drop(0.3)[0], mask_generator(7)))
    expected = torch.where(mask.bool(), x, 0.0)
    assert torch.equal(masked(x, mask).nan_to_num(), expected.nan_to_num())
    assert set(mask.unique().tolist()) == {-1, 0}
    strided = masked(x.t(), mask.t())
    assert torch.equal(strided.nan_to_num(), expected.t().nan_to_num())


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 37, 53), (0, 4)])
@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
def test_a_packed_mask_comes_back_as_it_was_and_takes_a_bit_an_element(shape: tuple[int, ...], p: float):
    kept = draw_kept(shape, quantised_drop(p)[0], mask_generator(3))
    packed = pack_kept(kept)
    assert packed.nbytes == -(-kept.numel() // 8)
    again = unpack_mask(packed, shape)
    assert again.dtype == torch.int16 and torch.equal(again, as_mask(kept))


def test_zero_returns_the_input_and_one_returns_zeros():
    x = torch.randn(10, requires_grad=True)
    assert dropout(x, 0.0) is x
    out = dropout(x, 1.0)
    assert not out.any()
    out.sum().backward()
    assert x.grad is not None and not x.grad.any()
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout(x, 1.5)


def test_the_gradient_passes_where_the_element_passed():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    out = dropout(x, 0.4)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, out != 0)
    assert torch.allclose(x.grad[out != 0], torch.tensor(quantised_drop(0.4)[1], dtype=torch.float64))


def test_the_seed_decides_the_mask():
    x = torch.ones(5000)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append((dropout(x, 0.3), dropout(x, 0.3)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 16), nn.Dropout(0.1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_masks_again(reentrant: bool):
    network, x = _network(), torch.randn(50, 16, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        with fast_dropout():
            out = checkpoint(network, x, use_reentrant=reentrant) if checkpointed else network(x)
            gradients.append(_backward(network, out))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def _backward(network: nn.Module, out: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad()
    out.square().sum().backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def test_it_replaces_the_dropout_of_any_module_and_leaves_evaluation_alone():
    network, x = _network(), torch.randn(400, 16)
    torch.manual_seed(5)
    stock = network(x)
    torch.manual_seed(5)
    with fast_dropout():
        ours = network(x)
        torch.manual_seed(5)
        again = network(x)
        network.eval()
        evaluated = network(x)
    assert not torch.equal(stock, ours)
    assert torch.equal(ours, again)
    assert torch.equal(evaluated, network(x))


SCRIPT = """
import torch, hashlib
from isotune.models.cpu.functional import dropout
torch.manual_seed(3)
out = dropout(torch.randn(1000, 1000), 0.1)
print(torch.get_num_threads(), hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit():
    seen = {}
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        used, bits = done.stdout.split()
        seen[used] = bits
    assert seen.keys() == {"1", "2"}
    assert len(set(seen.values())) == 1
