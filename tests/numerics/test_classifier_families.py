"""Every family trains as its stock model does on each text alone, packed, padded or one by one, and so do its masks."""

import copy
import inspect
import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from tests.causal_models import small_config
from tests.classifier_families import FAMILIES, VOCABULARY, Family
from torch import nn
from transformers import AutoModelForSequenceClassification

from isotune.models.classifier import install_classification
from isotune.models.isolation import check_isolation
from isotune.models.layouts.choose import choose_layout
from isotune.models.layouts.layout import PADDED
from isotune.models.packed_attention import PACKED

LENGTHS = (23, 6, 40, 11)
TARGETS = torch.tensor([2, 0, 1, 2])
EACH_FAMILY = pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family.fast else pytest.mark.slow, id=family.name) for family in FAMILIES],
)


def texts() -> list[torch.Tensor]:
    """Random tokens, some of them such as families pad with."""
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(4, VOCABULARY, (length,), generator=draw) for length in LENGTHS]


def row(documents: list[torch.Tensor]) -> dict:
    bounds = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    longest = max(map(len, documents))
    return {"input_ids": torch.cat(documents)[None], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
            "max_length_q": longest, "max_length_k": longest}  # fmt: skip


def each_alone(model) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Logits and gradients of the stock model, a new copy for each text: BigBird's remembers the texts before."""
    for text, target in zip(texts(), TARGETS, strict=True):
        fresh = copy.deepcopy(model)
        kept = {"use_cache": False} if "use_cache" in inspect.signature(fresh.forward).parameters else {}
        logits = fresh(input_ids=text[None], attention_mask=torch.ones_like(text)[None], **kept).logits
        nn.functional.cross_entropy(logits, target[None], reduction="sum").backward()
        yield logits[0].detach(), {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}


@EACH_FAMILY
def test_logits_loss_and_gradients_are_those_of_the_stock_model_on_each_text_alone(family: Family):
    model = family.build(dropout=0.0).train()
    alone = list(each_alone(model))
    expected = torch.stack([logits for logits, _ in alone])
    layout = install_classification(model)
    assert layout.name == family.layout and bool(layout.reason) == (family.layout != "packed")
    assert layout.reads == family.reads
    found = model(**row(texts()), targets=TARGETS)
    found.loss.backward()
    assert (found.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    loss = nn.functional.cross_entropy(expected, TARGETS, reduction="sum")
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    largest, error = 0.0, 0.0
    for name, parameter in model.named_parameters():
        gradients = [gradient[name] for _, gradient in alone if name in gradient]
        if parameter.grad is None:
            assert not any(gradient.any() for gradient in gradients)
            continue
        total = torch.stack(gradients).sum(dim=0)
        largest = math.hypot(largest, total.norm().item())
        error = math.hypot(error, (parameter.grad - total).norm().item())
    assert error <= 1e-5 * largest


@EACH_FAMILY
def test_dropout_of_a_text_does_not_depend_on_its_neighbours_and_the_attention_type_is_kept(family: Family):
    model = family.build(dropout=0.2)
    layout = install_classification(model)
    types = [module.attention_type for module in model.modules() if hasattr(module, "attention_type")]
    found = check_isolation(
        model, VOCABULARY, torch.device("cpu"), torch.float32, classifier=True, padded=layout.name != "packed"
    )
    assert found["leak"] == 0 and found["with_dropout"] < 1e-4
    assert types == [module.attention_type for module in model.modules() if hasattr(module, "attention_type")]


def test_a_window_that_only_masks_know_pads_texts_that_are_longer():
    """A window of 2,000 tokens is not reached by the measurement, so what the masks ask for is compared."""
    for longest, name in ((2_000, PACKED), (2_001, PADDED)):
        kinds = ["sliding_attention"] * 2
        config = small_config("qwen2", num_labels=3, use_sliding_window=True, sliding_window=2_000, layer_types=kinds)
        config.max_position_embeddings = 4_096
        torch.manual_seed(0)
        model: Any = AutoModelForSequenceClassification.from_config(config)
        model.model.layers[1].self_attn.sliding_window = None
        layout = choose_layout(model, longest)
        assert layout.name == name
        assert not layout.reason or layout.reason == "only its mask knows its window of 2000 tokens"
