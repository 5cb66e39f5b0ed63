"""The CPU kernel against torch's own attention, in fp64 where only a wrong formula can differ."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from isotune.models.cpu import document_attention as module
from isotune.models.cpu.document_attention import document_attention

HEADS, SIZE = 4, 8


def _tensors(tokens: int, key_heads: int, dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (size * torch.randn(1, heads, tokens, SIZE, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for heads in (HEADS, key_heads, key_heads)
    ]


def _reference(tensors: list[torch.Tensor], bounds: list[int], scale: float, causal: bool) -> torch.Tensor:
    grouped = tensors[0].shape[1] != tensors[1].shape[1]
    outs = [
        scaled_dot_product_attention(
            *(t[:, :, start:stop] for t in tensors), scale=scale, is_causal=causal, enable_gqa=grouped
        )
        for start, stop in pairwise(bounds)
        if stop > start
    ]
    return torch.cat(outs, dim=2).transpose(1, 2)


def _bounds(lengths: list[int]) -> list[int]:
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.one_of(st.integers(0, 20), st.sampled_from([128, 129, 300])), min_size=1, max_size=4))
def test_outputs_and_gradients_are_those_of_sdpa_on_each_document(key_heads: int, causal: bool, lengths: list[int]):
    bounds = _bounds([*lengths, 1])
    tensors = _tensors(bounds[-1], key_heads, torch.float64)
    ours = document_attention(*tensors, bounds, scale=0.3, causal=causal)
    theirs = _reference(tensors, bounds, 0.3, causal)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    gradients = (torch.autograd.grad(out, tensors, upstream) for out in (ours, theirs))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_gradient_with_dropout_is_that_of_the_masks_that_were_dealt():
    tensors = [t.detach()[:, :, :7].requires_grad_() for t in _tensors(7, 2, torch.float64)]

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return document_attention(*qkv, [0, 3, 7], scale=0.5, causal=True, dropout=0.4)

    assert torch.autograd.gradcheck(attend, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_kept_give_the_same_bits_as_weights_computed_again(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "KEPT_UP_TO_TOKENS", 200)  # one document below it, one above, one at it
    bounds = _bounds([150, 260, 200])
    tensors = [t.detach().to(dtype).requires_grad_() for t in _tensors(bounds[-1], 2, torch.float32)]
    found = []
    for keep in (False, True):
        torch.manual_seed(5)
        out = document_attention(*tensors, bounds, scale=0.3, causal=True, dropout=0.1, keep_weights=keep)
        assert len(out.grad_fn.kept) == (2 + 2 if keep else 0)  # blocks of 128 queries
        found.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():  # nothing waits where no backward pass will come
        assert torch.equal(document_attention(*tensors, bounds, scale=0.3, causal=True, keep_weights=True),
                           document_attention(*tensors, bounds, scale=0.3, causal=True))  # fmt: skip


def test_dropout_keeps_the_mean_and_drops_everything_at_one():
    query, key, value = (t.detach() for t in _tensors(64, HEADS, torch.float32))
    torch.manual_seed(0)
    run = {"bounds": [0, 64], "scale": 0.3, "causal": False}
    outs = torch.stack([document_attention(query, key, value, **run, dropout=0.25) for _ in range(400)])
    plain = document_attention(query, key, value, **run)
    error = outs.std(0) / 400**0.5
    assert ((outs.mean(0) - plain).abs() / error).max() < 6.0
    assert not torch.equal(outs[0], outs[1])
    assert not document_attention(query, key, value, **run, dropout=1.0).any()


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_bf16_is_no_further_from_the_truth_than_torchs_own_kernel(size: float):
    bounds = [0, 200, 430]
    tensors = _tensors(430, HEADS, torch.bfloat16, size=size)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = _reference(exact, bounds, SIZE**-0.5, True)
    upstream = torch.randn_like(truth)
    true_gradients = torch.autograd.grad(truth, exact, upstream)
    errors = []
    for attend in (document_attention, None):
        if attend is None:
            out = _reference(tensors, bounds, SIZE**-0.5, True)
        else:
            out = attend(*tensors, bounds, scale=SIZE**-0.5, causal=True)
        gradients = torch.autograd.grad(out, tensors, upstream.bfloat16())
        pairs = zip((out, *gradients), (truth, *true_gradients), strict=True)
        errors.append([((one.double() - other).norm() / other.norm()).item() for one, other in pairs])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.3 * theirs


def test_autocast_neither_rounds_the_scores_nor_breaks_the_backward_pass():
    tensors = _tensors(150, HEADS, torch.bfloat16, size=3.0)
    bounds, upstream = [0, 150], torch.randn(1, 150, HEADS, SIZE).bfloat16()
    plain = document_attention(*tensors, bounds, scale=1.0, causal=True)
    expected = torch.autograd.grad(plain, tensors, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        out = document_attention(*(t.float() for t in tensors), bounds, scale=1.0, causal=True)
        gradients = torch.autograd.grad(out, tensors, upstream)
    assert torch.equal(out, plain)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)


def test_no_square_of_the_row_is_kept_or_computed_at_once():
    tokens = 1024
    tensors = _tensors(tokens, HEADS, torch.float32)
    largest = _LargestTensor()
    with largest:
        document_attention(*tensors, [0, tokens], scale=1.0, causal=True).sum().backward()
    assert largest.elements <= HEADS * module.QUERIES_PER_BLOCK * tokens


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out
