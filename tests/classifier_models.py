"""Every classifier of the installed transformers that builds from a small configuration, measured on texts alone.

`python -m tests.models_table` writes the table of docs/models.md; tests/numerics/test_classifier_table.py holds it.
"""

import copy
import inspect
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from isotune.models.classifier import install_classification
from isotune.models.isolation import check_isolation
from isotune.models.packed_attention import PACKED
from tests.causal_models import LARGEST, SMALL, NotSmall, small_config

KINDS = tuple(sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES))
LENGTHS, TARGETS = (23, 6, 40, 11), (2, 0, 1, 2)


@dataclass(frozen=True)
class Measured:
    """One type: how its texts run, and the largest differences to the stock model on each text alone."""

    kind: str
    form: str  # packed, padded or alone
    reads: str  # which states of a text its head reads
    why: str  # it is not packed
    logits: float  # relative to the largest
    loss: float  # relative
    gradient: float  # of all parameters, relative to its norm


def small_classifier(kind: str) -> Any:
    """A classifier of three classes without dropout, with weights so large that every leak shows; NotSmall if none."""
    try:
        config = small_config(kind, num_labels=3)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        with torch.device("meta"):
            numel = sum(p.numel() for p in AutoModelForSequenceClassification.from_config(config).parameters())
        if numel > LARGEST:
            raise NotSmall(f"{numel:,} parameters")
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except NotSmall:
        raise
    except Exception as error:
        raise NotSmall(f"{type(error).__name__}: {error}") from error
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
    return model


def stock(model: Any, text: torch.Tensor) -> torch.Tensor:
    """The logits of a text alone, [classes], by the model's own forward."""
    kept = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=text[None], attention_mask=torch.ones_like(text)[None], **kept).logits[0]


def measure(kind: str, dtype: torch.dtype = torch.float32) -> Measured:
    """Train on four texts in one row, and on each text alone; UserError or RunFault where the type is refused."""
    model = small_classifier(kind).to(dtype).train()
    draw = torch.Generator().manual_seed(5)
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", SMALL["vocab_size"]))
    texts = [torch.randint(4, vocabulary, (length,), generator=draw) for length in LENGTHS]
    targets, logits, total = torch.tensor(TARGETS), list[torch.Tensor](), dict[str, torch.Tensor]()
    try:
        stock(copy.deepcopy(model), texts[0])
    except Exception as error:
        if getattr(model.config, "is_encoder_decoder", False):
            install_classification(model)  # which has its own reason
        raise NotSmall(f"its own forward: {type(error).__name__}: {error}") from error
    for text, target in zip(texts, targets, strict=True):
        fresh = copy.deepcopy(model)  # some remember the texts before
        own = stock(fresh, text)
        cross_entropy(own, target).backward()
        logits.append(own.detach())
        for name, parameter in fresh.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, torch.zeros(())) + parameter.grad
    expected = torch.stack(logits)
    layout = install_classification(model)
    padded = layout.name != PACKED
    check_isolation(model, vocabulary, torch.device("cpu"), dtype, classifier=True, padded=padded)
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    row: dict[str, Any] = {"input_ids": torch.cat(texts)[None], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    found = model(**row, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS), targets=targets)
    found.loss.backward()
    wanted = float(cross_entropy(expected, targets, reduction="sum"))
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    error = math.hypot(*(float((ours.get(n, torch.zeros(())) - g).norm()) for n, g in total.items()), 0.0)
    return Measured(
        kind,
        layout.name,
        layout.reads,
        layout.reason,
        float((found.logits.detach() - expected).abs().max() / expected.abs().max()),
        abs(float(found.loss.detach()) - wanted) / wanted,
        error / math.hypot(*(float(g.norm()) for g in total.values()), 0.0),
    )
