"""Triton's kernels, compiled: what tests/virtual_cuda/test_triton.py asks of them in the interpreter."""

import pytest
import torch
from tests import triton_cases
from tests.triton_cases import DROPOUTS, DTYPES, LOSSES
from tests.virtual_cuda.test_triton import check_dropout, check_edges, check_loss

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts_kernel_drops_what_the_cpu_drops_forward_and_backward(name: str, dtype: str):
    check_dropout(triton_cases.dropout("cuda", name, dtype), dtype, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_heads_kernel_gives_the_loss_and_gradients_of_fp64(name: str, dtype: str):
    check_loss(triton_cases.loss("cuda", name, dtype), name, dtype)


def test_predictions_at_the_edges_have_an_exact_finite_loss():
    check_edges(triton_cases.edges("cuda"))


def test_probabilities_near_the_smallest_fp16_number_are_not_rounded_away():
    assert triton_cases.half_precision("cuda") <= 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_head_repeats_to_the_bit(dtype: str):
    one, other = (triton_cases.loss("cuda", "blocks and a bit", dtype) for _ in range(2))
    assert one == other
