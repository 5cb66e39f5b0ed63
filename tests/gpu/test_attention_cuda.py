"""The CUDA kernels behind `packed`: against attention in fp64, and to the bit when a neighbour changes."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from isotune.models import packed_attention as module
from isotune.models.packed_attention import (
    DOCUMENT_SDPA,
    FLASH_ATTENTION,
    TORCH_VARLEN,
    kernel_in_effect,
    packed_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LENGTHS = (1, 130, 64, 301)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def _bounds() -> list[int]:
    return torch.tensor([0, *LENGTHS]).cumsum(0).tolist()


def _tensors(dtype: torch.dtype, key_heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (4, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes]


def _attend(tensors: list[torch.Tensor], causal: bool, dropout: float = 0.0) -> torch.Tensor:
    bounds = torch.tensor(_bounds(), dtype=torch.int32, device="cuda")
    return packed_attention(
        nn.Module(),
        *tensors,
        None,
        dropout=dropout,
        is_causal=causal,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(LENGTHS),
        max_length_k=max(LENGTHS),
    )[0]


@pytest.fixture(params=[FLASH_ATTENTION, TORCH_VARLEN, DOCUMENT_SDPA])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel in turn, by taking those before it away."""
    if request.param != FLASH_ATTENTION:
        monkeypatch.setattr(module, "_flash_attention", lambda: None)
    if request.param == DOCUMENT_SDPA:
        monkeypatch.setattr(module, "_torch_varlen_options", lambda: None)
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
        tensors = _tensors(torch.bfloat16)
        upstream = torch.randn_like(_attend(tensors, causal=True))
        runs = [torch.autograd.grad(_attend(tensors, causal=True), tensors, upstream) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_fp32_runs_document_by_document_and_dropout_never_on_torchs_varlen_kernel():
    assert kernel_in_effect("cuda", torch.float32) == DOCUMENT_SDPA
    assert kernel_in_effect("cuda", torch.bfloat16, dropout=0.1) != TORCH_VARLEN
    assert kernel_in_effect("cuda", torch.bfloat16, head_size=20) == DOCUMENT_SDPA
    tensors = _tensors(torch.float32, key_heads=4)
    assert _attend(tensors, causal=True, dropout=0.1).isfinite().all()
