"""The CPU kernel against torch's own attention, in fp64 where only a wrong formula can differ."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from isotune.models.attention_form import AttentionForm, whole_attention
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
    ours = document_attention(*tensors, bounds, AttentionForm(0.3, causal))
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
        return document_attention(*qkv, [0, 3, 7], AttentionForm(0.5, True), dropout=0.4)

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
        out = document_attention(*tensors, bounds, AttentionForm(0.3, True), dropout=0.1, keep_weights=keep)
        assert len(out.grad_fn.kept) == (2 + 2 if keep else 0)  # blocks of 128 queries
        found.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():  # nothing waits where no backward pass will come
        assert torch.equal(document_attention(*tensors, bounds, AttentionForm(0.3, True), keep_weights=True),
                           document_attention(*tensors, bounds, AttentionForm(0.3, True)))  # fmt: skip


def test_dropout_keeps_the_mean_and_drops_everything_at_one():
    query, key, value = (t.detach() for t in _tensors(64, HEADS, torch.float32))
    torch.manual_seed(0)
    run = {"bounds": [0, 64], "form": AttentionForm(0.3, False)}
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
            out = attend(*tensors, bounds, AttentionForm(SIZE**-0.5, True))
        gradients = torch.autograd.grad(out, tensors, upstream.bfloat16())
        pairs = zip((out, *gradients), (truth, *true_gradients), strict=True)
        errors.append([((one.double() - other).norm() / other.norm()).item() for one, other in pairs])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.3 * theirs


def test_autocast_neither_rounds_the_scores_nor_breaks_the_backward_pass():
    tensors = _tensors(150, HEADS, torch.bfloat16, size=3.0)
    bounds, upstream = [0, 150], torch.randn(1, 150, HEADS, SIZE).bfloat16()
    plain = document_attention(*tensors, bounds, AttentionForm(1.0, True))
    expected = torch.autograd.grad(plain, tensors, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        out = document_attention(*(t.float() for t in tensors), bounds, AttentionForm(1.0, True))
        gradients = torch.autograd.grad(out, tensors, upstream)
    assert torch.equal(out, plain)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)


def test_no_square_of_the_row_is_kept_or_computed_at_once():
    tokens = 1024
    tensors = _tensors(tokens, HEADS, torch.float32)
    largest = _LargestTensor()
    with largest:
        document_attention(*tensors, [0, tokens], AttentionForm(1.0, True)).sum().backward()
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


FORMS = {
    "a causal window": AttentionForm(0.3, True, window=37),
    "a window of one block": AttentionForm(0.3, True, window=128),
    "a window on both sides": AttentionForm(0.3, False, window=37),
    "capped scores": AttentionForm(0.9, True, softcap=2.0),
    "capped scores in a window": AttentionForm(0.9, True, window=50, softcap=2.0),
}


def _eager(tensors: list[torch.Tensor], bounds: list[int], form: AttentionForm, sinks: torch.Tensor | None):
    """transformers' eager attention of Gemma 2 (caps) or gpt-oss (sinks), document by document, with masks of loops."""
    query, key, value = tensors
    outputs = []
    for start, stop in pairwise(bounds):
        n = stop - start
        mask = torch.full((n, n), torch.finfo(query.dtype).min, dtype=query.dtype)
        for i in range(n):
            for j in range(n):
                if (j <= i or not form.causal) and (form.window is None or abs(i - j) < form.window):
                    mask[i, j] = 0.0
        stock = nn.Module()
        stock.num_key_value_groups, stock.sinks = query.shape[1] // key.shape[1], sinks
        eager = modeling_gemma2.eager_attention_forward if sinks is None else modeling_gpt_oss.eager_attention_forward
        cap = {"softcap": form.softcap} if sinks is None else {}
        rows = [t[:, :, start:stop] for t in (query, key, value)]
        outputs.append(eager(stock, *rows, mask[None, None], scaling=form.scale, **cap)[0])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("key_heads", [2, HEADS])
@pytest.mark.parametrize("name", [*FORMS, "sinks", "sinks in a window"])
def test_windows_caps_and_sinks_are_those_of_stock_attention_on_each_document(name: str, key_heads: int):
    bounds = _bounds([150, 1, 20, 290])
    tensors = _tensors(bounds[-1], key_heads, torch.float64)
    sinks = torch.linspace(-1.0, 2.0, HEADS, dtype=torch.float64).requires_grad_() if "sinks" in name else None
    form = FORMS.get(name, AttentionForm(0.3, True, window=60 if "window" in name else None))
    inputs = [*tensors, sinks] if sinks is not None else tensors
    expected = _eager(tensors, bounds, form, sinks)
    upstream = torch.randn_like(expected)
    true_gradients = torch.autograd.grad(expected, inputs, upstream)
    for keep in (False, True):
        out = document_attention(*tensors, bounds, form, sinks=sinks, keep_weights=keep)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # gpt-oss and Gemma 2 round weights to fp32
        for ours, theirs in zip(torch.autograd.grad(out, inputs, upstream), true_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    whole = torch.cat(
        [
            whole_attention(*(t[:, :, start:stop] for t in tensors), form, sinks=sinks).transpose(1, 2)
            for start, stop in pairwise(bounds)
        ],
        dim=1,
    )
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)


def test_a_window_bounds_the_blocks_that_a_long_document_is_computed_in():
    form, tokens = AttentionForm(1.0, True, window=200), 5_000
    blocks = list(form.blocks(tokens, 128))
    assert [rows.start for rows, _ in blocks] == list(range(0, tokens, 128))
    assert max(keys.stop - keys.start for _, keys in blocks) == 128 + 199
    both = AttentionForm(1.0, False, window=200)
    assert max(keys.stop - keys.start for _, keys in both.blocks(tokens, 128)) == 128 + 2 * 199
