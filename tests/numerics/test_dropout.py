"""Dropout by document: which numbers an element gets, on CPU and in the operators of a GPU, and what follows."""

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
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from isotune.io.errors import RunFault
from isotune.models.cpu import functional as on_cpu
from isotune.models.cpu.functional import as_mask, draw_kept, masked, pack_kept, unpack_mask
from isotune.models.cuda import dropout as on_cuda
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments, hashed, known_documents, mixed, quantised_drop, word_steps

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROW = MicrobatchDocuments([9, 4, 1_000_000, 2], [5, 70, 1, 33])


def hash_of(key: int, index: int) -> int:
    """The hash of the module's docstring, in Python's whole numbers."""
    x = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def mix_of(key: int, index: int) -> int:
    """The word of four elements, likewise."""
    x = (key ^ (index + 1) * 0x9E3779B97F4A7C15 % 2**64) * 0xBF58476D1CE4E5B9 % 2**64
    return (x ^ (x >> 32)) * 0x94D049BB133111EB % 2**64


def key_of_call(call: int) -> int:
    """The finaliser alone."""
    return hash_of((call - 0x9E3779B97F4A7C15) % 2**64, 0)


def is_kept(call: int, document: int, place: tuple[int, ...], p: float) -> bool:
    """What becomes of the element at `place` of a document, its position first."""
    key = hash_of(key_of_call(call), document)
    for index in place[:-1]:
        key = hash_of(key, index)
    number = mix_of(key, place[-1] // 4) >> (16 * (place[-1] % 4)) & 0xFFFF
    return (number + 2**15) % 2**16 >= round(p * 2**16)


def test_the_hash_is_splitmix64():
    # the first outputs of Vigna's splitmix64.c from the seed 1234567
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [hash_of(1234567, index) for index in range(5)] == expected
    seeds = np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1234567)
    assert hashed(seeds).tolist() == expected


def test_a_word_can_be_turned_back_into_its_key_so_its_four_numbers_are_uniform_and_independent():
    keys, steps = np.random.default_rng(0).integers(0, 2**64, 50, np.uint64), word_steps(29)
    words, spare = np.empty((2, 50, 8), np.uint64)
    mixed(keys, steps, words, spare)
    for key, of_key in zip(keys.tolist(), words.tolist(), strict=True):
        for index, word in enumerate(of_key):
            assert word == mix_of(key, index)
            x = word * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
            x = (x ^ (x >> 32)) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
            assert x ^ int(steps[index]) == key


def kept_by(shape: tuple[int, ...], documents: MicrobatchDocuments, p: float, seed: int, device: str) -> torch.Tensor:
    """The mask of one call, bool of this shape: by the CPU's functions, or by the operators that a GPU runs."""
    torch.manual_seed(seed)
    with known_documents(documents):
        drop = on_cpu.dropout if device == "cpu" else on_cuda.dropout
        return drop(torch.ones(shape), p) != 0


BOTH = pytest.mark.parametrize("device", ["cpu", "gpu's operators"])


@BOTH
@pytest.mark.parametrize("form", ["[1, tokens, n]", "[tokens, n]", "[documents, n]", "[1, tokens, m, n]"])
def test_every_element_of_a_packed_tensor_is_decided_by_its_document_and_place(form: str, device: str):
    tokens, n, p = sum(ROW.lengths), 11, 0.4
    lead = {"[1, tokens, n]": (1, tokens), "[tokens, n]": (tokens,), "[documents, n]": (4,)}
    shape = (*lead.get(form, (1, tokens, 3)), n)
    kept = kept_by(shape, ROW, p, seed=3, device=device)
    torch.manual_seed(3)
    call = int(torch.randint(2**62, ()))
    places = [(d, position) for d, length in zip(ROW.numbers, ROW.lengths, strict=True) for position in range(length)]
    if form == "[documents, n]":
        places = [(d, 0) for d in ROW.numbers]
    for line, (document, position) in zip(kept.view(len(places), -1, n), places, strict=True):
        for i, inner in enumerate(line):
            below = (position, i) if form == "[1, tokens, m, n]" else (position,)
            expected = [is_kept(call, document, (*below, feature), p) for feature in range(n)]
            assert inner.tolist() == expected


@BOTH
def test_every_element_of_padded_attention_weights_is_decided_by_its_document_and_place(device: str):
    padded = MicrobatchDocuments([7, 3], [4, 6], padded=True)
    kept = kept_by((2, 3, 6, 6), padded, 0.5, seed=1, device=device)
    torch.manual_seed(1)
    call = int(torch.randint(2**62, ()))
    for d, document in enumerate(padded.numbers):
        for head in range(3):
            for query in range(6):
                expected = [is_kept(call, document, (head, query, key), 0.5) for key in range(6)]
                assert kept[d, head, query].tolist() == expected
    flat = kept_by((6, 6, 6), padded, 0.5, seed=1, device=device)
    assert torch.equal(flat.view(2, 3, 6, 6), kept), "heads in the first axis, as DeBERTa has them"


@BOTH
def test_padded_and_packed_give_a_document_the_same_mask(device: str):
    padded = MicrobatchDocuments(ROW.numbers, ROW.lengths, padded=True)
    packed = kept_by((1, 109, 16), ROW, 0.3, seed=2, device=device)[0].split(list(ROW.lengths))
    for shape in ((4, 70, 16), (4 * 70, 16)):
        lines = kept_by(shape, padded, 0.3, seed=2, device=device).view(4, 70, 16)
        for one, other, length in zip(lines, packed, ROW.lengths, strict=True):
            assert torch.equal(one[:length], other)
    head = kept_by((4, 16), ROW, 0.3, seed=2, device=device)
    assert torch.equal(head, kept_by((4, 16), padded, 0.3, seed=2, device=device))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 30)), min_size=1, max_size=6, unique_by=lambda d: d[0]),
       st.integers(0, 2**32), st.randoms(use_true_random=False))  # fmt: skip
def test_neighbours_and_order_change_no_documents_mask(documents: list[tuple[int, int]], seed: int, random: Any):
    def masks(row: list[tuple[int, int]]) -> dict[int, torch.Tensor]:
        numbers, lengths = zip(*row, strict=True)
        kept = kept_by((1, sum(lengths), 9), MicrobatchDocuments(numbers, lengths), 0.5, seed, "cpu")
        return dict(zip(numbers, kept[0].split(list(lengths)), strict=True))

    together = masks(documents)
    others = random.sample(documents, random.randint(1, len(documents)))
    assert all(torch.equal(mask, together[number]) for number, mask in masks(others).items())


@pytest.mark.parametrize("documents", [ROW, MicrobatchDocuments([1, 2], [3, 5], padded=True)])
@pytest.mark.parametrize("shape", [(7, 16), (1, 7, 16), (109,), (7, 2, 2, 4)])
def test_a_tensor_whose_documents_cannot_be_told_stops_the_run(documents: MicrobatchDocuments, shape: tuple[int, ...]):
    with training_microbatch(documents), pytest.raises(RunFault, match="documents cannot be told"):
        functional.dropout(torch.ones(shape), 0.1)


# ---- statistics: 64 documents x 64 positions x 256 features, in deviations of the exact distribution ----

STANDARD = MicrobatchDocuments(list(range(64)), [64] * 64)
LAGS = [(axis, lag) for axis, lags in enumerate([(1, 2, 8), (1, 2, 8), (1, 2, 3, 4, 8, 16, 128)]) for lag in lags]


def standardised(p: float, seed: int) -> np.ndarray:
    """One call's mask, of mean 0 and variance 1, [documents, positions, features]."""
    kept = kept_by((4096, 256), STANDARD, p, seed, "cpu").double().numpy().reshape(64, 64, 256)
    rate = quantised_drop(p)[0] / 2**16
    return (kept - (1 - rate)) / (rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_masks_have_their_rate_and_are_independent(p: float):
    z, other = standardised(p, seed=1), standardised(p, seed=2)
    correlations = {"rate": z, "calls, and steps": z * other}
    for axis, lag in LAGS:
        name = ("documents", "positions", "features")[axis]
        correlations[f"{name}, {lag} apart"] = np.delete(z, range(lag), axis) * np.delete(z, range(-lag, 0), axis)
    # four corners, where a XOR of keys of both axes would show; at 0.02 four drops at once are too rare to judge
    for one, other_axis in ((0, 1), (0, 2), (1, 2)) if p >= 0.1 else ():
        for lag in (1, 4):
            corners = z
            for axis in (one, other_axis):
                corners = np.delete(corners, range(lag), axis) * np.delete(corners, range(-lag, 0), axis)
            correlations[f"corners over axes {one} and {other_axis}, {lag} apart"] = corners
    for axis in range(3):  # whether some lines have more: sums over an axis, against their variance
        sums = z.sum(axis=axis) / z.shape[axis] ** 0.5
        correlations[f"sums over axis {axis}"] = (sums**2 - 1) / 2**0.5
    deviations = {name: float(c.mean()) * c.size**0.5 for name, c in correlations.items()}
    # 24 statistics at 4.5 deviations: one in 6,000 seeds fails; of few rare drops the tails are a little heavier
    assert all(abs(deviation) < 4.5 for deviation in deviations.values()), deviations


@pytest.mark.parametrize("threshold", [0, 1, 100, 6554, 32767, 32768, 32769, 65535, 65536])
def test_of_all_numbers_exactly_as_many_drop_an_element_as_the_threshold_says(threshold: int, monkeypatch):
    def every_number(keys: np.ndarray, steps: np.ndarray, out: np.ndarray, spare: np.ndarray) -> None:
        out.view(np.uint16)[:] = np.arange(2**16, dtype=np.uint16).reshape(len(keys), -1)

    monkeypatch.setattr(on_cpu, "mixed", every_number)
    kept = draw_kept(np.zeros(16, np.uint64), 4096, threshold)
    assert kept.shape == (16, 4096) and kept.sum().item() == 2**16 - threshold


def test_the_blocks_in_which_a_mask_is_computed_do_not_show(monkeypatch):
    keys = np.arange(300, dtype=np.uint64) * np.uint64(2**50)
    whole = draw_kept(keys, 101, 20_000)
    for block in (1, 26, 700):
        monkeypatch.setattr(on_cpu, "WORDS_PER_BLOCK", block)
        assert torch.equal(draw_kept(keys, 101, 20_000), whole)
    assert draw_kept(keys[:0], 101, 20_000).shape == (0, 101)


@settings(max_examples=200)
@given(p=st.floats(0.0, 1.0, allow_subnormal=False))
def test_the_scale_is_one_over_the_probability_in_effect(p: float):
    threshold, scale = quantised_drop(p)
    assert abs(threshold / 65536 - p) <= 1 / 65536
    assert threshold == 65536 or scale * (1 - threshold / 65536) == pytest.approx(1.0, rel=1e-12)
    assert (threshold == 0) == (p == 0.0) and (threshold == 65536) == (p == 1.0)


# ---- what an element becomes ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_elements_are_scaled_and_dropped_ones_are_zero(dtype: torch.dtype):
    x = torch.randn(37, 53, dtype=dtype)
    x[0, 0], x[1, 1] = float("inf"), float("nan")
    mask = as_mask(draw_kept(np.arange(37, dtype=np.uint64), 53, quantised_drop(0.3)[0]))
    expected = torch.where(mask.bool(), x, 0.0)
    assert torch.equal(masked(x, mask).nan_to_num(), expected.nan_to_num())
    assert set(mask.unique().tolist()) == {-1, 0}
    strided = masked(x.t(), mask.t())
    assert torch.equal(strided.nan_to_num(), expected.t().nan_to_num())


@pytest.mark.parametrize("lines, features", [(1, 1), (1, 7), (3, 5), (74, 53), (0, 4)])
@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
def test_a_packed_mask_comes_back_as_it_was_and_takes_a_bit_an_element(lines: int, features: int, p: float):
    kept = draw_kept(np.arange(lines, dtype=np.uint64), features, quantised_drop(p)[0])
    packed = pack_kept(kept)
    assert packed.nbytes == -(-kept.numel() // 8)
    again = unpack_mask(packed, kept.shape)
    assert again.dtype == torch.int8 and torch.equal(again, as_mask(kept))


@BOTH
def test_zero_returns_the_input_and_one_returns_zeros(device: str):
    drop = on_cpu.dropout if device == "cpu" else on_cuda.dropout
    x = torch.randn(109, 10, requires_grad=True)
    with known_documents(ROW):
        assert drop(x, 0.0) is x
        out = drop(x, 1.0)
        assert not out.any()
        out.sum().backward()
        assert x.grad is not None and not x.grad.any()
        with pytest.raises(ValueError, match="between 0 and 1"):
            drop(x, 1.5)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_have_one_mask(dtype: torch.dtype, device: str):
    drop = on_cpu.dropout if device == "cpu" else on_cuda.dropout
    x = torch.randn(109, 64, dtype=dtype).abs().add(0.5).requires_grad_()
    torch.manual_seed(2)
    with known_documents(ROW):
        out = drop(x, 0.4)
        out.sum().backward()
    scale = quantised_drop(0.4)[1]
    assert x.grad is not None and torch.equal(x.grad != 0, out != 0) and 0.5 < (out != 0).double().mean() < 0.7
    torch.testing.assert_close(out, torch.where(out != 0, x * scale, 0.0))
    torch.testing.assert_close(x.grad, torch.where(out != 0, torch.full_like(x, scale), 0.0))


def test_the_seed_decides_the_mask_and_each_call_draws_its_own():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with training_microbatch(ROW):
            draws.append([functional.dropout(torch.ones(109, 50), 0.3) for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 16), nn.Dropout(0.1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_masks_again(reentrant: bool):
    network, x = _network(), torch.randn(109, 16, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        with training_microbatch(ROW):
            out = checkpoint(network, x, use_reentrant=reentrant) if checkpointed else network(x)
            gradients.append(_backward(network, out))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def _backward(network: nn.Module, out: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad()
    out.square().sum().backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def test_it_replaces_the_dropout_of_any_module_and_leaves_evaluation_alone():
    network, x = _network(), torch.randn(109, 16)
    torch.manual_seed(5)
    stock = network(x)
    torch.manual_seed(5)
    with training_microbatch(ROW):
        ours = network(x)
        torch.manual_seed(5)
        again = network(x)
        network.eval()
        evaluated = network(x)
    assert not torch.equal(stock, ours)
    assert torch.equal(ours, again)
    assert torch.equal(evaluated, network(x))


def test_a_module_that_drops_in_place_gets_its_input_changed():
    x = torch.ones(109, 16)
    with training_microbatch(ROW):
        out = nn.Dropout(0.5, inplace=True)(x)
    assert out is x and 0 < (x == 0).sum() < x.numel()


@pytest.mark.parametrize("masked_by", ["nothing", "causal", "bool", "numbers"])
def test_sdpa_of_a_padded_model_drops_by_document_and_is_torchs_without_dropout(masked_by: str):
    q, k, v = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    hidden = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    hidden[0, ..., 4:] = False
    given: dict[str, Any] = {"enable_gqa": True, "scale": 0.3}
    given |= {"causal": {"is_causal": True}, "bool": {"attn_mask": hidden}}.get(masked_by, {})
    if masked_by == "numbers":
        given["attn_mask"] = torch.zeros(2, 1, 1, 6).masked_fill(~hidden, -torch.inf)
    stock = functional.scaled_dot_product_attention(q, k, v, **given)
    with training_microbatch(MicrobatchDocuments([7, 3], [4, 6], padded=True)):
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v, **given), stock)
        almost = functional.scaled_dot_product_attention(q, k, v, dropout_p=1e-9, **given)  # drops 1 of 65,536
        outs = torch.stack(
            [functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2, **given) for _ in range(3000)]
        )
    torch.testing.assert_close(almost, stock, rtol=1e-4, atol=1e-5)
    assert ((outs.mean(0) - stock).abs() / (outs.std(0) / 3000**0.5)).max() < 6.0
    with training_microbatch(MicrobatchDocuments([3], [6], padded=True)):
        torch.manual_seed(1)
        given["attn_mask"] = given["attn_mask"][1:] if "attn_mask" in given else None
        alone = functional.scaled_dot_product_attention(q[1:], k[1:], v[1:], dropout_p=0.2, **given)
    given["attn_mask"] = None if given["attn_mask"] is None else (hidden if masked_by == "bool" else None)
    torch.manual_seed(1)
    with training_microbatch(MicrobatchDocuments([7, 3], [4, 6], padded=True)):
        both = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2, **given)
    torch.testing.assert_close(both[1:], alone)


SCRIPT = """
import torch, hashlib
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
torch.manual_seed(3)
with training_microbatch(MicrobatchDocuments([4, 7], [300, 700])):
    out = torch.nn.functional.dropout(torch.randn(1000, 1000), 0.1)
print(torch.get_num_threads(), hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
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
