"""The function behind `attn_implementation="packed"`: which kernel runs, with what, and what each path gives."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    CamembertConfig,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.masking_utils import causal_mask_function, sdpa_mask

from isotune.io.errors import UserError
from isotune.models import packed_attention as module
from isotune.models.attention_form import AttentionForm, whole_attention
from isotune.models.document_keys import MicrobatchDocuments, known_documents
from isotune.models.packed_attention import (
    DOCUMENT_PRODUCTS,
    DOCUMENT_SDPA,
    FLASH_ATTENTION,
    TORCH_VARLEN,
    Windows,
    document_position_ids,
    kernel_in_effect,
    last_kernel,
    lengths_of,
    max_positions,
    noted_windows,
    packed_attention,
    packed_mask,
    set_packed_attention,
)

HEADS, KEY_HEADS, SIZE = 4, 2, 8
BOUNDS = [0, 5, 5, 6, 19]


def tensors(tokens: int = BOUNDS[-1], dtype: torch.dtype = torch.float32, rows: int = 1) -> list[torch.Tensor]:
    """Query, key and value of a few heads."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(rows, h, tokens, SIZE, generator=generator).to(dtype) for h in (HEADS, KEY_HEADS, KEY_HEADS)]


def weights_in_loops(query: torch.Tensor, key: torch.Tensor, sinks: torch.Tensor | None, **how: Any) -> torch.Tensor:
    """Attention weights [queries, keys] of one head of one document, in float64, score by score."""
    rows = []
    for i, q in enumerate(query.double()):
        scores = []
        for j, k in enumerate(key.double()):
            score = (q @ k) * how["scale"]
            if how.get("softcap"):
                score = how["softcap"] * torch.tanh(score / how["softcap"])
            seen = (j <= i or not how["causal"]) and abs(i - j) < (how.get("window") or 10**9)
            scores.append(score if seen else torch.tensor(-torch.inf, dtype=torch.float64))
        if sinks is not None:
            scores.append(sinks.double())
        rows.append(torch.stack(scores).softmax(0)[: len(key)])
    return torch.stack(rows)


def in_loops(given: list[torch.Tensor], bounds: list[int], sinks: torch.Tensor | None = None, **how: Any):
    """[1, tokens, heads, size] in float64: document by document, head by head."""
    query, key, value = given
    out = torch.zeros(1, query.shape[2], HEADS, SIZE, dtype=torch.float64)
    for start, stop in pairwise(bounds):
        for head in range(HEADS if stop > start else 0):
            own, group = slice(start, stop), head // (HEADS // KEY_HEADS)
            sink = None if sinks is None else sinks[head]
            weights = weights_in_loops(query[0, head, own], key[0, group, own], sink, **how)
            out[0, own, head] = weights @ value[0, group, own].double()
    return out


def attention_module(is_causal: bool | None) -> nn.Module:
    """With what transformers' attention modules say of themselves."""
    module = nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS
    if is_causal is not None:
        module.is_causal = is_causal
    return module


HOW = {
    "as the module says": ({}, {}),
    "scaled": ({"scaling": 0.9}, {"scale": 0.9}),
    "both ways": ({"is_causal": False}, {"causal": False}),
    "in a window": ({"sliding_window": 3}, {"window": 3}),
    "in a window both ways": ({"sliding_window": 3, "is_causal": False}, {"window": 3, "causal": False}),
    "in a window as long as the longest document": ({"sliding_window": 13}, {"window": 13}),
    "capped": ({"softcap": 0.7}, {"softcap": 0.7}),
    "with sinks": ({"s_aux": torch.linspace(-1, 2, HEADS)}, {}),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", HOW)
def test_every_path_gives_what_loops_over_documents_heads_and_tokens_give(name: str, inference: bool):
    """With gradients on, the products of document_attention.py; in inference mode torch's kernel in fp32."""
    given, how = HOW[name]
    expected = in_loops(tensors(), BOUNDS, given.get("s_aux"), **{"scale": SIZE**-0.5, "causal": True, **how})
    with torch.inference_mode(inference):
        bounds = torch.tensor(BOUNDS, dtype=torch.int32)
        found, weights = packed_attention(attention_module(True), *tensors(), None, cu_seq_lens_q=bounds, **given)
    assert weights is None and last_kernel() == DOCUMENT_PRODUCTS
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "name", ["scaled", "in a window", "in a window as long as the longest document", "capped", "with sinks"]
)
def test_without_bounds_the_row_is_one_document(name: str, is_causal: bool):
    given, how = HOW[name]
    whole = [0, BOUNDS[-1]]
    expected = in_loops(tensors(), whole, given.get("s_aux"), **{"scale": SIZE**-0.5, "causal": is_causal, **how})
    found, weights = packed_attention(attention_module(is_causal), *tensors(), None, **given)
    assert weights is None and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["capped", "with sinks", "scaled"])
def test_padding_is_hidden_without_bounds_whatever_the_scores_are(name: str):
    given, how = HOW[name]
    seen = torch.ones(1, 1, 19, 19, dtype=torch.bool).tril()
    seen[..., 15:] = False
    expected = in_loops(tensors(), [0, 15, 19], given.get("s_aux"), **{"scale": SIZE**-0.5, "causal": True, **how})
    found, _ = packed_attention(attention_module(True), *tensors(), seen, **given)
    torch.testing.assert_close(found.double()[:, :15], expected[:, :15], rtol=1e-5, atol=1e-6)


def test_a_module_that_says_nothing_is_causal():
    silent, causal, both_ways = (
        packed_attention(attention_module(said), *tensors(), None, softcap=1.0)[0] for said in (None, True, False)
    )
    assert torch.equal(silent, causal) and not torch.equal(silent, both_ways)


def test_what_packed_attention_does_not_know_is_refused():
    one = {"cu_seq_lens_q": torch.tensor(BOUNDS, dtype=torch.int32)}
    with pytest.raises(UserError, match="attention uses position_bias, which packed attention lacks"):
        packed_attention(attention_module(True), *tensors(), None, position_bias=torch.zeros(1), **one)
    packed_attention(attention_module(True), *tensors(), None, position_ids=torch.arange(19)[None], layer_idx=3, **one)
    with pytest.raises(AssertionError, match="no padding, hence no mask"):
        packed_attention(attention_module(True), *tensors(), torch.ones(1, 1, 19, 19, dtype=torch.bool), **one)
    with pytest.raises(AssertionError, match="one row, without a cache"):
        packed_attention(attention_module(True), *tensors(rows=2), None, **one)
    query, key, value = tensors()
    with pytest.raises(AssertionError, match="one row, without a cache"):
        packed_attention(attention_module(True), query[:, :, :6], key, value, None, **one)
    for bounds in ([0, 5, 18], [1, 5, 19], [0, 5, 20]):
        with pytest.raises(AssertionError, match="documents cover the row"):
            packed_attention(
                attention_module(True), *tensors(), None, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32)
            )


def test_a_varlen_kernel_gets_tokens_first_and_the_longest_document(monkeypatch: pytest.MonkeyPatch):
    """Both kernels are of GPUs; what stands in their place computes in loops what they are given."""
    for name, function in ((FLASH_ATTENTION, "_run_flash_attention"), (TORCH_VARLEN, "flash_varlen")):
        for given, longest in (({}, 13), ({"max_length_q": 17}, 17)):

            def run(q, k, v, bounds, most, form, expected=longest):
                assert most == expected
                rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
                return in_loops(rows, bounds.tolist(), scale=form.scale, causal=form.causal)[0]

            with monkeypatch.context() as patched:
                patched.setattr(module, "kernel_in_effect", lambda *_, it=name: it)
                patched.setattr(module, function, run)
                bounds = torch.tensor(BOUNDS, dtype=torch.int32)
                found, _ = packed_attention(attention_module(True), *tensors(), None, cu_seq_lens_q=bounds, **given)
            assert last_kernel() == name
            assert torch.equal(found, in_loops(tensors(), BOUNDS, scale=SIZE**-0.5, causal=True))


def test_the_kernel_of_training_is_known_after_an_evaluation(monkeypatch: pytest.MonkeyPatch):
    kernels = {True: DOCUMENT_PRODUCTS, False: DOCUMENT_SDPA}  # as on a GPU: another where weights are dropped
    monkeypatch.setattr(module, "kernel_in_effect", lambda device, dtype, dropout, *_: kernels[dropout > 0])
    bounds, attention = torch.tensor(BOUNDS, dtype=torch.int32), attention_module(True)
    for training in (True, False):
        dropout = 0.5 if training else 0.0
        packed_attention(attention.train(training), *tensors(), None, dropout=dropout, cu_seq_lens_q=bounds)
    assert last_kernel() == DOCUMENT_SDPA and last_kernel(in_training=True) == DOCUMENT_PRODUCTS


def test_positions_that_restart_need_bounds_and_a_mask_or_one_token_does_not():
    restarted = torch.tensor([[*range(9), *range(10)]])
    with pytest.raises(AssertionError, match="positions restart"):
        packed_attention(attention_module(True), *tensors(), None, position_ids=restarted)
    back_by_one = torch.tensor([[0, 1, 2, 1, 2, 3, *range(3, 16)]])
    with pytest.raises(AssertionError, match="positions restart"):
        packed_attention(attention_module(True), *tensors(), None, position_ids=back_by_one)
    for one_document in (torch.full((1, 19), 7), torch.arange(19)[None]):
        packed_attention(attention_module(True), *tensors(), None, position_ids=one_document)
    mask = torch.ones(1, 1, 19, 19, dtype=torch.bool).tril()
    packed_attention(attention_module(True), *tensors(), mask, position_ids=restarted)
    packed_attention(attention_module(True), *tensors(1), None, position_ids=torch.tensor([[4]]))


# of a GPU with every kernel: dtype, dropout, head size, cap, sinks
KERNELS = [
    ({}, FLASH_ATTENTION, TORCH_VARLEN),
    ({"dtype": torch.float16}, FLASH_ATTENTION, TORCH_VARLEN),
    ({"head_size": 8}, FLASH_ATTENTION, TORCH_VARLEN),
    ({"head_size": 256}, FLASH_ATTENTION, TORCH_VARLEN),
    ({"softcap": 30.0}, FLASH_ATTENTION, DOCUMENT_SDPA),
    ({"dtype": torch.float32}, DOCUMENT_SDPA, DOCUMENT_SDPA),
    ({"dropout": 0.1}, DOCUMENT_SDPA, DOCUMENT_SDPA),
    ({"sinks": True}, DOCUMENT_SDPA, DOCUMENT_SDPA),
    ({"head_size": 0}, DOCUMENT_SDPA, DOCUMENT_SDPA),
    ({"head_size": 20}, DOCUMENT_SDPA, DOCUMENT_SDPA),
    ({"head_size": 264}, DOCUMENT_SDPA, DOCUMENT_SDPA),
]


@pytest.mark.parametrize(("given", "with_flash", "without"), KERNELS)
def test_the_kernel_of_a_gpu_is_the_fastest_that_can(given, with_flash, without, monkeypatch: pytest.MonkeyPatch):
    """tests/gpu/test_attention_cuda.py asks the same of a card; here there is none, so what it says is replaced."""
    given = {"dtype": torch.bfloat16, **given}
    for has_flash, has_varlen, capability, expected in (
        (True, True, (8, 0), with_flash),
        (True, False, (9, 0), with_flash),
        (False, True, (12, 1), without),
        (False, False, (8, 6), DOCUMENT_SDPA),
        (True, True, (7, 5), DOCUMENT_SDPA),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        monkeypatch.setattr(module, "_flash_attention", lambda it=has_flash: print if it else None)
        monkeypatch.setattr(module, "has_flash_varlen", lambda it=has_varlen: it)
        assert kernel_in_effect("cuda", **given) == expected
        assert kernel_in_effect("cpu", **given) == DOCUMENT_PRODUCTS
        assert kernel_in_effect("mps", **given) == DOCUMENT_SDPA


@pytest.mark.parametrize(
    ("form", "window"),
    [
        (AttentionForm(0.3, True), None),
        (AttentionForm(0.3, False, softcap=2.0), None),
        (AttentionForm(0.3, True, window=5), (4, 0)),
        (AttentionForm(0.3, False, window=5), (4, 4)),
    ],
)
def test_flash_attention_is_told_the_whole_form(form: AttentionForm, window, monkeypatch: pytest.MonkeyPatch):
    told: dict[str, Any] = {}
    monkeypatch.setattr(module, "_flash_attention", lambda: lambda *given, **options: told.update(options) or given)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    query, key, value = tensors()
    before = torch.are_deterministic_algorithms_enabled()
    for deterministic in (True, False):
        told.clear()
        torch.use_deterministic_algorithms(deterministic)
        try:
            given = module._run_flash_attention(query, key, value, bounds, 13, form)
        finally:
            torch.use_deterministic_algorithms(before)
        assert all(g is e for g, e in zip(given, (query, key, value, bounds, bounds, 13, 13), strict=True))
        expected = {"softmax_scale": 0.3, "causal": form.causal, "deterministic": deterministic}
        expected |= {} if window is None else {"window_size": window}
        assert told == expected | ({} if form.softcap is None else {"softcap": form.softcap})


def test_the_kernel_is_chosen_by_what_is_attended(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple] = []
    monkeypatch.setattr(module, "kernel_in_effect", lambda *given: asked.append(given) or DOCUMENT_PRODUCTS)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    query, key, value = tensors()
    wide = torch.cat([value, value], dim=-1)
    for v, more in (
        (value, {}),
        (wide, {"dropout": 0.1}),
        (value, {"softcap": 2.0}),
        (value, {"s_aux": torch.zeros(HEADS)}),
    ):
        packed_attention(attention_module(True), query, key, v, None, cu_seq_lens_q=bounds, **more)
    cpu = torch.device("cpu")
    assert asked == [
        (cpu, torch.float32, 0.0, SIZE, None, False),
        (cpu, torch.float32, 0.1, 0, None, False),
        (cpu, torch.float32, 0.0, SIZE, 2.0, False),
        (cpu, torch.float32, 0.0, SIZE, None, True),
    ]


def test_a_device_is_not_waited_for_where_the_documents_are_known():
    """A tensor of the device `meta` has no numbers that could be read."""
    elsewhere = torch.empty(4, dtype=torch.int32, device="meta")
    with known_documents(MicrobatchDocuments([7, 8, 9], [3, 0, 2])):
        assert lengths_of(elsewhere) == [3, 0, 2] and module._on_host(elsewhere) == [0, 3, 3, 5]
        assert lengths_of(torch.tensor([0, 1, 5], dtype=torch.int32)) == [1, 4], "those of the host are read"
    with pytest.raises(NotImplementedError):
        lengths_of(elsewhere)


def test_positions_restart_where_the_model_type_begins_to_count():
    bounds = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    for config, first in ((BertConfig(), 0), (RobertaConfig(pad_token_id=1), 2), (RobertaConfig(pad_token_id=5), 6)):
        expected = [[first, first + 1, first + 2, first, first + 1]]
        assert document_position_ids(config, bounds).tolist() == expected
        assert document_position_ids(config, bounds, tokens=5).tolist() == expected
    assert lengths_of(bounds) == [3, 0, 2]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PreTrainedConfig(), None),
        (BertConfig(max_position_embeddings=-1), None),  # as XLNet says that it has no limit
        (BertConfig(max_position_embeddings=0), None),
        (BertConfig(max_position_embeddings=1), 1),
        (BertConfig(max_position_embeddings=512), 512),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (XLMRobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (CamembertConfig(max_position_embeddings=514, pad_token_id=1), 512),
    ],
)
def test_the_longest_document_has_as_many_tokens_as_there_are_positions(config: PreTrainedConfig, expected):
    assert max_positions(config) == expected


def test_a_mask_is_made_only_where_there_is_padding_or_a_cache():
    sizes = {"batch_size": 2, "mask_function": causal_mask_function}
    assert packed_mask(q_length=4, kv_length=4, **sizes) is None
    padding = torch.tensor([[False, True, True, True], [True] * 4])
    found = packed_mask(q_length=4, kv_length=4, attention_mask=padding, **sizes)
    assert torch.equal(found, sdpa_mask(q_length=4, kv_length=4, attention_mask=padding, **sizes))
    seen = [[[j <= i and bool(padding[row, j]) for j in range(4)] for i in range(1, 4)] for row in range(2)]
    assert found[:, 0, 1:].tolist() == seen
    cached = {"q_length": 1, "kv_length": 4, "q_offset": 3, "allow_is_causal_skip": False}
    assert packed_mask(**cached, **sizes).tolist() == [[[[True] * 4]]] * 2


def test_windows_that_masks_ask_for_and_attention_is_given_are_noted_for_one_forward():
    sizes = {"batch_size": 1, "mask_function": causal_mask_function, "q_length": 4, "kv_length": 4}
    with noted_windows() as outer:
        packed_mask(**sizes, local_size=7)
        with noted_windows() as inner:
            packed_mask(**sizes)
            packed_attention(attention_module(True), *tensors(), None)
        assert (inner.asked, inner.given) == (set(), {})
        module = attention_module(True)
        packed_attention(module, *tensors(), None, sliding_window=7)
        packed_attention(attention_module(True), *tensors(), None)
        packed_mask(**sizes, local_size=0)
    assert (outer.asked, outer.given) == ({7}, {id(module): {7}})


@pytest.mark.parametrize(("kinds", "given", "lost"), [
    (None, [{7}, {7}], None),
    (None, [], 7),
    (["full_attention"] * 2, [], None),
    (["full_attention", "sliding_attention"], [{7}], None),
    (["sliding_attention", "sliding_attention"], [{7}], 7),
    (["sliding_attention", "chunked_attention"], [{7}, {7}], 20),
    (["sliding_attention", "chunked_attention"], [{7}, {21}], None),
])  # fmt: skip
def test_a_window_is_lost_where_a_layer_of_its_kind_was_given_none(kinds: Any, given: list[set[int]], lost: int | None):
    asked = {7} if kinds is None or "chunked_attention" not in kinds else {7, 20}
    windows = Windows(asked, dict(enumerate(given)))
    config = LlamaConfig()
    config.layer_types = kinds
    reason = windows.lost(config, 1_000)
    assert reason == (lost and f"only its mask knows its window of {lost} tokens")
    assert windows.lost(config, 7) is None


def test_a_model_whose_attention_cannot_be_replaced_is_refused(monkeypatch: pytest.MonkeyPatch):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=10, **small))
    set_packed_attention(model)
    assert model.config._attn_implementation == "packed"
    for name, answer in (("lets_attention_be_replaced", False), ("attention_of", "eager")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda _, it=answer: it)
            with pytest.raises(UserError, match="'llama' does not let its attention be replaced"):
                set_packed_attention(model)


@pytest.mark.parametrize("window", [None, 700, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_takes_blocks_of_queries_where_no_kernel_knows_it(causal: bool, window: int | None, monkeypatch):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 1_300, 8, dtype=torch.float64) for heads in (4, 2, 2))
    form, sinks = AttentionForm(0.3, causal, window, softcap=4.0), torch.randn(4, dtype=torch.float64)
    expected, sizes = whole_attention(query, key, value, form, sinks=sinks), list[int]()

    def noted(q: torch.Tensor, k: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        sizes.append(k.shape[2])
        return whole_attention(q, k, *rest, **more)

    monkeypatch.setattr(module, "whole_attention", noted)
    found = module._by_blocks(query, key, value, form, sinks, 0.0)
    assert (found - expected).abs().max() <= 1e-12
    reach = 1_300 if window is None else window - 1
    assert max(sizes) <= min(1_300, module.QUERIES_AT_ONCE + reach * (1 if causal else 2))


def test_no_score_beyond_a_window_is_computed_in_evaluation(monkeypatch):
    """Without gradients and in fp32 torch's kernel is used, which knows no window."""
    monkeypatch.setattr(module, "whole_attention", None)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 60, 8) for _ in range(3))
    bounds = torch.tensor([0, 50, 60], dtype=torch.int32)
    with torch.inference_mode():
        given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "sliding_window": 16, "is_causal": False}
        found, _ = packed_attention(attention_module(False), query, key, value, None, **given)
    form = AttentionForm(8**-0.5, False, 16)
    parts = [whole_attention(*(t[:, :, a:b] for t in (query, key, value)), form) for a, b in ((0, 50), (50, 60))]
    assert (found - torch.cat(parts, dim=2).transpose(1, 2)).abs().max() <= 1e-6
