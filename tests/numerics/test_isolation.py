"""Documents of a packed row are strangers: to the bit when a neighbour changes, to rounding when all others leave."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from isotune.models.packed_attention import document_position_ids, set_packed_attention

VOCABULARY = 300
# Weights as large as a trained model's: with transformers' default of 0.02 the logits of so small a model, and with
# them every leak and every error, would be almost zero.
SPREAD = 0.1
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=64, word_embed_proj_dim=32, ffn_dim=128, max_position_embeddings=600, init_std=SPREAD, **SMALL
        )
    )


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_key_value_heads=2, initializer_range=SPREAD, **SMALL)
    )


ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 600,
    "initializer_range": SPREAD,
    **SMALL,
}
GEOMETRIES = {
    "opt": _opt,
    "llama": _llama,
    "bert": lambda: BertModel(BertConfig(**ENCODER)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=VOCABULARY, initializer_range=SPREAD)
    ),
    "roberta": lambda: RobertaModel(RobertaConfig(**ENCODER)),
}


@cache
def _model(name: str, attention: str = "packed", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = GEOMETRIES[name]().to(dtype).eval()
    if attention == "packed":
        set_packed_attention(model)
    else:
        model.set_attn_implementation(attention)
    return model


@dataclass
class Pass:
    """What one document of a row got: its logits (an encoder: its states), and its own loss's gradients."""

    outputs: torch.Tensor
    embedding_gradient: torch.Tensor
    weight_gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def _bounds(documents: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor([len(d) for d in documents]).cumsum(0)], dtype=torch.int32)


def _inputs(model: PreTrainedModel, documents: list[torch.Tensor]) -> dict[str, Any]:
    bounds = _bounds(documents)
    longest = max(len(d) for d in documents)
    inputs: dict[str, Any] = {
        "position_ids": document_position_ids(model.config, bounds),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if model.config.model_type in ("opt", "llama"):
        inputs["use_cache"] = False
    return inputs


def _run(model: PreTrainedModel, documents: list[torch.Tensor], which: int) -> Pass:
    bounds = _bounds(documents).tolist()
    mine = slice(bounds[which], bounds[which + 1])
    embedded = model.get_input_embeddings()(torch.cat(documents)[None]).detach().requires_grad_()
    model.zero_grad()
    outputs = model(inputs_embeds=embedded, **_inputs(model, documents))[0][0, mine]
    targets = documents[which].roll(-1) % outputs.shape[1]
    cross_entropy(outputs.float(), targets, reduction="sum").backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert embedded.grad is not None
    outside = torch.ones(embedded.shape[1], dtype=torch.bool)
    outside[mine] = False
    assert not embedded.grad[0, outside].any(), "a loss has no gradient in another document"
    return Pass(outputs.detach(), embedded.grad[0, mine], gradients)


def _draw_documents(lengths: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (n,), generator=generator) for n in lengths]


# lengths around the kernel's blocks of 128 queries belong to the interesting ones
LENGTHS = st.lists(st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 257])), min_size=2, max_size=5)


def _assert_same_bits(one: Pass, other: Pass) -> None:
    assert torch.equal(one.outputs, other.outputs)
    assert torch.equal(one.embedding_gradient, other.embedding_gradient)
    assert one.weight_gradients.keys() == other.weight_gradients.keys()
    for name, gradient in one.weight_gradients.items():
        assert torch.equal(gradient, other.weight_gradients[name]), name


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=8, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**16), which=st.integers(0, 4))
def test_a_replaced_neighbour_changes_no_bit_of_a_document(name: str, lengths: list[int], seed: int, which: int):
    documents, others = _draw_documents(lengths, seed), _draw_documents(lengths, seed + 1)
    which %= len(documents)
    others[which] = documents[which]
    _assert_same_bits(_run(_model(name), documents, which), _run(_model(name), others, which))


@pytest.mark.parametrize("name", ["opt", "llama", "bert"])
@settings(max_examples=4, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**16), which=st.integers(0, 4))
def test_a_replaced_neighbour_changes_no_bit_in_bf16(name: str, lengths: list[int], seed: int, which: int):
    model = _model(name, dtype=torch.bfloat16)
    documents, others = _draw_documents(lengths, seed), _draw_documents(lengths, seed + 1)
    which %= len(documents)
    others[which] = documents[which]
    _assert_same_bits(_run(model, documents, which), _run(model, others, which))


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=8, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**16))
def test_packed_documents_equal_documents_run_alone_by_stock_attention(name: str, lengths: list[int], seed: int):
    documents = _draw_documents(lengths, seed)
    packed, stock = _model(name), _model(name, "eager")
    bounds = _bounds(documents).tolist()
    with torch.no_grad():
        together = packed(input_ids=torch.cat(documents)[None], **_inputs(packed, documents))[0][0]
        for document, start, stop in zip(documents, bounds, bounds[1:], strict=False):
            alone = stock(input_ids=document[None])[0][0]
            assert (together[start:stop] - alone).abs().max() <= 1e-6 * alone.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_reason_stock_padding_free_packing_leaks_in_opt(attention: str):
    """TRL's padding-free batches are flattened ids with restarted positions, of which OPT's mask knows nothing."""
    model = _model("opt", attention)
    documents = _draw_documents([30, 20], seed=3)
    replaced = [_draw_documents([30], seed=4)[0], documents[1]]
    positions = document_position_ids(model.config, _bounds(documents))
    with torch.no_grad():
        before, after = (
            model(input_ids=torch.cat(d)[None], position_ids=positions, use_cache=False).logits[0, 30:]
            for d in (documents, replaced)
        )
    assert (before - after).abs().max() > 0.1


def test_stock_padded_batches_and_generation_work_under_packed_attention():
    packed, stock = _model("llama"), _model("llama", "sdpa")
    ids = torch.stack(_draw_documents([12, 12], seed=5))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # padded on the left
    run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(packed.generate(ids, **run), stock.generate(ids, **run))
    seen = mask.bool()
    with torch.no_grad():
        one, other = (m(input_ids=ids, attention_mask=mask).logits[seen] for m in (packed, stock))
    assert torch.equal(one, other)


def test_restarted_positions_without_bounds_are_refused():
    documents = _draw_documents([5, 6], seed=6)
    model = _model("llama")
    inputs = {"position_ids": document_position_ids(model.config, _bounds(documents)), "use_cache": False}
    with pytest.raises(AssertionError, match="cu_seq_lens_q"):
        model(input_ids=torch.cat(documents)[None], **inputs)
