"""The CUDA kernels behind `packed`: against attention in fp64, and to the bit when a neighbour changes."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from tests.virtual_cuda.test_promises import attend
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from isotune.models import packed_attention as module
from isotune.models.packed_attention import (
    DOCUMENT_SDPA,
    FLASH_ATTENTION,
    TORCH_VARLEN,
    kernel_in_effect,
    last_kernel,
    packed_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LENGTHS = (1, 130, 64, 301)
LONG = (1024, 130, 2048)  # of many blocks of keys, whose shares of a query's gradient are summed in no order otherwise
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def _bounds(lengths: Sequence[int] = LENGTHS) -> list[int]:
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


def _tensors(
    dtype: torch.dtype, key_heads: int = 2, seed: int = 0, lengths: Sequence[int] = LENGTHS
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes]


def _attend(
    tensors: list[torch.Tensor], causal: bool, dropout: float = 0.0, lengths: Sequence[int] = LENGTHS
) -> torch.Tensor:
    bounds = torch.tensor(_bounds(lengths), dtype=torch.int32, device="cuda")
    return packed_attention(
        nn.Module(),
        *tensors,
        None,
        dropout=dropout,
        is_causal=causal,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    )[0]


@pytest.fixture(params=[FLASH_ATTENTION, TORCH_VARLEN, DOCUMENT_SDPA])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel in turn, by taking those before it away."""
    if request.param != FLASH_ATTENTION:
        monkeypatch.setattr(module, "_flash_attention", lambda: None)
    if request.param == DOCUMENT_SDPA:
        monkeypatch.setattr(module, "has_flash_varlen", lambda: False)
    if kernel_in_effect("cuda", torch.bfloat16) != request.param:
        pytest.skip(f"{request.param} is not installed or this device is too old for it")
    return request.param


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_each_document_alone(kernel: str, dtype: torch.dtype, causal: bool):
    tensors = _tensors(dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.cat(
        [
            scaled_dot_product_attention(*(t[:, :, a:b] for t in exact), is_causal=causal, enable_gqa=True)
            for a, b in pairwise(_bounds())
        ],
        dim=2,
    ).transpose(1, 2)
    upstream = torch.randn_like(expected)
    found = _attend(tensors, causal)
    pairs = zip(
        (found, *torch.autograd.grad(found, tensors, upstream.to(dtype))),
        (expected, *torch.autograd.grad(expected, exact, upstream)),
        strict=True,
    )
    for one, other in pairs:
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm()


def test_a_replaced_neighbour_changes_no_bit(kernel: str):
    tensors, others = _tensors(torch.bfloat16), _tensors(torch.bfloat16, seed=1)
    mine = slice(131, 195)
    with torch.no_grad():
        for tensor, other in zip(tensors, others, strict=True):
            other[:, :, mine] = tensor[:, :, mine]
        one, two = _attend(tensors, causal=True)[:, mine], _attend(others, causal=True)[:, mine]
    assert torch.equal(one, two)


def test_the_backward_pass_repeats_to_the_bit_when_determinism_is_asked_for(kernel: str):
    torch.use_deterministic_algorithms(True)
    try:
        tensors = _tensors(torch.bfloat16, lengths=LONG)
        attend = partial(_attend, tensors, causal=True, lengths=LONG)
        upstream = torch.randn_like(attend())
        runs = [torch.autograd.grad(attend(), tensors, upstream) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_fp32_and_dropped_weights_run_document_by_document():
    assert kernel_in_effect("cuda", torch.float32) == DOCUMENT_SDPA
    assert kernel_in_effect("cuda", torch.bfloat16, dropout=0.1) == DOCUMENT_SDPA
    assert kernel_in_effect("cuda", torch.bfloat16, head_size=20) == DOCUMENT_SDPA
    tensors = _tensors(torch.float32, key_heads=4)
    assert _attend(tensors, causal=True, dropout=0.1).isfinite().all()


def test_under_autocast_fp32_of_rotary_embeddings_keeps_the_kernel(kernel: str):
    query, key, value = _tensors(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        found = _attend([query.float(), key.float(), value], causal=True)
    assert last_kernel() == kernel
    assert torch.equal(found, _attend([query, key, value], causal=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_which_weights_are_dropped_depends_on_the_document_and_the_call_alone(autocast: bool):
    alone, together, others = (attend(n, autocast=autocast) for n in ([9], [4, 9, 2, 7], [7, 4, 9]))
    assert together["9"] == others["9"] == alone["9"] and together["7"] == others["7"]
    assert attend([9], seed=4, autocast=autocast)["9"] != alone["9"]
    assert attend([9], known=False, autocast=autocast)["9"] != alone["9"]
