"""Causal models that no list names: packed where their own forward allows it, else padded, and exact in both forms.

The reference is a loop over the documents with the stock model and its own attention: nothing of ours is in it.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.causal_models import small_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from isotune.config import Recipe
from isotune.io.errors import RunFault, UserError
from isotune.models.causal import CausalForm, install_causal
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
from isotune.models.isolation import check_isolation, packed_inputs
from isotune.models.opening import load_base_model, load_config

VOCABULARY = 97
LENGTHS = (9, 30, 17)
NOT_REPLACEABLE = "its attention cannot be replaced"

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 1, "bos_token_id": 2}
SMALL |= {"eos_token_id": 2, "num_hidden_layers": 2, "num_attention_heads": 4}
LIKE_LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CAPS: dict[str, Any] = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

# configuration keys, and why the model is padded where it is
KINDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "granite": (LIKE_LLAMA | {"logits_scaling": 3.0, "embedding_multiplier": 2.0}, None),
    "cohere": (SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "logit_scale": 0.25}, None),
    "gemma2": (LIKE_LLAMA | {"sliding_window": 16} | CAPS, None),
    "gemma3_text": (LIKE_LLAMA | {"sliding_window": 16}, None),
    "gpt_oss": (LIKE_LLAMA | EXPERTS | {"sliding_window": 16, "num_local_experts": 4}, None),
    "qwen3_moe": (LIKE_LLAMA | EXPERTS | {"num_experts": 4}, None),
    "phi3": (SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}, None),
    "bloom": (SMALL | {"n_layer": 2, "n_head": 4}, NOT_REPLACEABLE),
    "gptj": (SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, NOT_REPLACEABLE),
    "mamba": (SMALL, NOT_REPLACEABLE),
    "llama4_text": (LIKE_LLAMA | EXPERTS | {"attention_chunk_size": 16, "intermediate_size_mlp": 48,
                                            "num_local_experts": 4}, "its logits differ from those of each document"),
}  # fmt: skip


def _build(kind: str, **options: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**KINDS[kind][0], **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms, biases and sinks are ones and zeros in a new model
        if parameter.dim() == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model


def _documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def _supervised(inputs: dict[str, Any]) -> torch.Tensor:
    """A part of the places of a row, none of them the first of a document."""
    chosen = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(2)) < 0.6
    chosen[inputs["cu_seq_lens_q"][:-1].long()] = False
    return chosen.nonzero()[:, 0]


def _gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_stock_model_on_each_document_alone(kind: str):
    model, documents = _build(kind), _documents()
    inputs = packed_inputs(documents, torch.device("cpu"), positions=True)
    places = _supervised(inputs)
    expected, start = torch.zeros(()), 0
    for document in documents:
        logits = model(input_ids=document[None], use_cache=False).logits[0]
        own = places[(places >= start) & (places < start + len(document))] - start
        expected = expected + cross_entropy(logits[own - 1], document[own], reduction="sum")
        start += len(document)
    reference = _gradients(model, expected)
    form = install_causal(model, max_seq_length=64)
    reason = KINDS[kind][1]
    assert form.why_padded == reason if reason is None else str(form.why_padded).startswith(reason)
    assert not form.stock_logits
    loss = model(**inputs, supervised_positions=places - 1, targets=inputs["input_ids"][0, places]).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, largest = _gradients(model, loss), max(float(g.norm()) for g in reference.values())
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * max(float(gradient.norm()), 1e-2 * largest), name


def test_a_head_of_no_known_form_is_measured_and_the_models_own_logits_are_used():
    model, documents = _build("granite"), _documents()
    inputs = packed_inputs(documents, torch.device("cpu"), positions=True)
    places = _supervised(inputs)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda states: forward(states) * torch.linspace(0.5, 1.5, VOCABULARY)
    logits = torch.cat([model(input_ids=document[None], use_cache=False).logits[0] for document in documents])
    expected = cross_entropy(logits[places - 1], inputs["input_ids"][0, places], reduction="sum")
    assert install_causal(model, max_seq_length=64) == CausalForm(None, stock_logits=True)
    loss = model(**inputs, supervised_positions=places - 1, targets=inputs["input_ids"][0, places]).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_whose_tokens_see_later_ones_is_refused():
    config = AutoConfig.for_model("bert", **SMALL | {"intermediate_size": 48})
    with pytest.raises(UserError, match="'bert' lets a token see the ones after it"):
        install_causal(AutoModelForCausalLM.from_config(config), max_seq_length=64)


def test_a_window_that_no_attention_is_given_pads_documents_that_are_longer(monkeypatch: pytest.MonkeyPatch):
    """A window of 2,000 tokens is not reached by the measurement, so what the masks ask for is compared."""
    for longest, reason in ((2_000, None), (2_001, "only its mask knows its window of 2000 tokens")):
        model = _build("gemma3_text", sliding_window=2_000)
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        assert install_causal(model, max_seq_length=longest).why_padded == reason


def test_one_layer_without_its_window_pads_documents_too():
    model = _build("gemma3_text", sliding_window=2_000, layer_types=["sliding_attention"] * 2)
    model.model.layers[0].self_attn.sliding_window = None
    assert install_causal(model, max_seq_length=2_001).why_padded == "only its mask knows its window of 2000 tokens"


def test_a_window_that_is_switched_off_is_none():
    """Qwen1.5-MoE as published: its masks of a window of 0 tokens belong to no layer."""
    keys = LIKE_LLAMA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16, "use_sliding_window": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **keys))
    assert install_causal(model, max_seq_length=64) == CausalForm()


def test_the_self_test_finds_later_tokens_and_other_logits_than_the_stock_models():
    """Where a model was not measured as it was loaded, as in shares."""
    model = _build("granite")
    install_causal(model, max_seq_length=64)
    check = functools.partial(check_isolation, model, VOCABULARY, torch.device("cpu"), torch.float32)
    assert check()["against_stock"] <= 1e-5
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(RunFault, match="a token sees the ones after it"):
        check()
    for layer in model.model.layers:
        layer.self_attn.is_causal = True
    model.register_forward_pre_hook(lambda _, args, given: (args, given | _doubled(given)), with_kwargs=True)
    with pytest.raises(RunFault, match="logits differ from those of the model's own forward"):
        check()


def _doubled(given: dict[str, Any]) -> dict[str, Any]:
    """Positions of a stock forward that are not those of a row."""
    if given.get("attention_mask") is None:
        return {}
    return {"position_ids": 2 * torch.arange(given["input_ids"].shape[1])[None]}


@pytest.mark.parametrize("kind", ["nemotron", "llama4_text", "qwen3_moe"])
def test_a_base_in_4_bits_is_measured_as_a_whole_one_is(kind: str, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    small_model(kind).save_pretrained(tmp_path)
    values = {"tune": "qlora", "max_seq_length": 64, "bf16": False, "output_dir": "runs/none"}
    asked = Recipe.from_values(model_name_or_path=str(tmp_path), dataset_name="builtin:greetings", **values)
    model = load_base_model(asked, load_config(asked), torch.device("cpu"))
    assert any(hasattr(parameter, "quant_state") for parameter in model.parameters())
    padded = install_causal(model, max_seq_length=64).why_padded is not None
    assert padded == (install_causal(small_model(kind), max_seq_length=64).why_padded is not None)
    found = check_isolation(model, VOCABULARY, torch.device("cpu"), torch.float32, padded=padded)
    assert found["leak"] == 0.0 and found["against_stock"] <= 1e-4


@pytest.mark.parametrize("kind", ["bloom", "granite"])
def test_dropout_belongs_to_the_document_in_a_padded_model_too(kind: str):
    more = {"hidden_dropout": 0.3, "attention_dropout": 0.3} if kind == "bloom" else {"attention_dropout": 0.3}
    model = _build(kind, **more)
    padded = install_causal(model, max_seq_length=64).why_padded is not None
    found = check_isolation(model, VOCABULARY, torch.device("cpu"), torch.float32, padded=padded)
    assert found["leak"] == 0.0 and found["with_dropout"] <= 1e-6
    documents, losses = _documents(), []
    model.train()
    for group in ([0, 1, 2], [2], [1, 0]):
        inputs = packed_inputs([documents[i] for i in group], torch.device("cpu"), positions=True)
        torch.manual_seed(5)
        bounds = inputs["cu_seq_lens_q"][:-1].long()
        places = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
        places[bounds] = False
        where = places.nonzero()[:, 0]
        with training_microbatch(MicrobatchDocuments(group, [LENGTHS[i] for i in group], padded)):
            targets = inputs["input_ids"][0, where]
            losses.append(float(model(**inputs, supervised_positions=where - 1, targets=targets).loss.detach()))
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-6)


def test_a_type_whose_documents_change_each_other_by_a_trace_is_padded():
    """A short convolution over new weights moves logits by less than rounding may."""
    form = install_causal(small_model("lfm2_moe"), max_seq_length=64)
    assert form.why_padded == "documents change each other"
