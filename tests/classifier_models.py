"""Every classifier of the installed transformers that builds from a small configuration, measured on texts alone.

`python -m tests.models_table` writes the table of docs/models.md; tests/numerics/test_classifier_table.py holds it.
"""

import copy
import inspect
import math
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from isotune.models.classifier import install_classification
from isotune.models.isolation import check_isolation
from isotune.models.packed_attention import PACKED
from tests.causal_models import LARGEST, SMALL, NotSmall, small_config
from tests.small_adapters import Adapted, LoraCheck, each_alone, gradients, recipe_in

KINDS = tuple(sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES))
LENGTHS, TARGETS = (23, 6, 40, 11), (2, 0, 1, 2)


@dataclass(frozen=True)
class Measured:
    """One type: how its texts run, and the largest differences to the stock model on each text alone."""

    kind: str
    form: str  # packed, padded or alone
    reads: str  # which states of a text its head reads
    why: str  # it is not packed
    leak: float  # into a text whose neighbour is replaced, relative to the largest logit
    logits: float  # relative to the largest
    loss: float  # relative
    gradient: float  # of all parameters, relative to its norm
    lora: Adapted | None


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


def measure(kind: str, dtype: torch.dtype = torch.float32, *, with_lora: bool = True) -> Measured:
    """Train on four texts in one row, and on each text alone; UserError or RunFault where the type is refused."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(kind, dtype, Path(folder) if with_lora else None)


def _measure(kind: str, dtype: torch.dtype, folder: Path | None) -> Measured:
    model = small_classifier(kind).to(dtype).train()
    draw = torch.Generator().manual_seed(5)
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", SMALL["vocab_size"]))
    texts = [torch.randint(4, vocabulary, (length,), generator=draw) for length in (*LENGTHS, LENGTHS[1])]
    texts, other = texts[:-1], texts[-1]
    targets = torch.tensor(TARGETS)
    try:
        stock(copy.deepcopy(model), texts[0])
    except Exception as error:
        if getattr(model.config, "is_encoder_decoder", False):
            install_classification(model)  # which has its own reason
        raise NotSmall(f"its own forward: {type(error).__name__}: {error}") from error

    def loss_of(logits: torch.Tensor, number: int) -> torch.Tensor:
        return cross_entropy(logits, targets[number])

    alone = each_alone(model, texts, stock, loss_of)
    expected = torch.stack(alone.logits)
    before = copy.deepcopy(model)
    layout = install_classification(model)
    padded = layout.name != PACKED
    check_isolation(model, vocabulary, torch.device("cpu"), dtype, classifier=True, padded=padded)

    def run(trained: Any, documents: list[torch.Tensor]) -> Any:
        bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
        row: Any = {"input_ids": torch.cat(documents)[None], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return trained(**row, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS), targets=targets)

    found = run(model, texts)
    found.loss.backward()
    ours, zero = gradients(model), torch.zeros(())
    error = math.hypot(*(float((ours.get(n, zero) - g).norm()) for n, g in alone.gradients.items()), 0.0)
    with torch.no_grad():  # both, for a kernel may be another where gradients are wanted
        change = (run(model, [texts[0], other, *texts[2:]]).logits - run(model, texts).logits).abs()
    lora = None
    if folder is not None:
        adapters = LoraCheck(before, recipe_in(folder, classifies=True), texts, stock, loss_of)
        lora = adapters.of(model, lambda trained: run(trained, texts).loss)
    return Measured(
        kind,
        layout.name,
        layout.reads,
        layout.reason,
        float(change[[0, *range(2, len(texts))]].max() / expected.abs().max()),
        float((found.logits.detach() - expected).abs().max() / expected.abs().max()),
        abs(float(found.loss.detach()) - alone.loss) / alone.loss,
        error / math.hypot(*(float(g.norm()) for g in alone.gradients.values()), 0.0),
        lora,
    )
