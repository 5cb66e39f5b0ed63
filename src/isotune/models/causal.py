"""Makes any causal language model take packed rows, exactly: unpadded where that is right, else padded inside.

No list decides. The loaded model is run on a few documents, each alone by its own forward and then together, and the
two must agree; only the types of KNOWN, which tests hold against their stock forward, are not measured again at start.
Whatever the decision, the self-test (isolation.py) measures the prepared model once more before the first step.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from isotune.compat.deepspeed import gathered_by_block
from isotune.compat.transformers import attention_of, set_attention_of
from isotune.io.errors import UserError, first_line
from isotune.models.isolation import ALONE_TOLERANCE, packed_inputs, random_documents, rounding_of_neighbours
from isotune.models.layouts.padding import pad_documents
from isotune.models.packed_attention import noted_windows, set_packed_attention
from isotune.models.supervised_loss import install_supervised_loss, use_stock_logits

# Types whose packed forward and loss are held against the stock model by tests/numerics/test_supervised_loss.py.
KNOWN = frozenset(
    {
        "gpt2", "gpt_neox", "gemma", "llama", "mistral", "olmo", "olmo2", "opt", "phi", "qwen2", "qwen3", "smollm3",
        "starcoder2",
    }
)  # fmt: skip
PROBE_LENGTHS = (9, 17, 12)
LONGEST_PROBE = 256  # tokens; a window beyond it is not reached by the measurement


@dataclass(frozen=True)
class CausalForm:
    """How a causal model runs a row."""

    why_padded: str | None = None  # None where it runs packed
    stock_logits: bool = False  # the loss needs all logits of a microbatch in memory at once


_forms: weakref.WeakKeyDictionary[nn.Module, CausalForm] = weakref.WeakKeyDictionary()  # of installed models


def install_causal(model: Any, max_seq_length: int) -> CausalForm:
    """Make a causal language model accept packed rows and `supervised_positions` (install_supervised_loss).

    `max_seq_length` is the longest document in tokens, which may be beyond a model's windows. Call it before peft wraps
    the model. UserError where neither form agrees with the model's own forward.
    """
    config = model.config.get_text_config()
    if config.model_type in KNOWN:
        set_packed_attention(model)
        install_supervised_loss(model)
        return CausalForm()
    if model in _forms:  # of an earlier trainer
        return _forms[model]
    with gathered_by_block(model):
        _forms[model] = _measured(model, config, max_seq_length)
    return _forms[model]


def _measured(model: Any, config: Any, max_seq_length: int) -> CausalForm:
    """Install the form that the model is measured right in; on the meta device, the one that its type offers."""
    mode, before = model.training, attention_of(model.config)
    model.eval()
    documents = _documents(config) if _can_run(model) else []
    with torch.no_grad():
        alone = [model(input_ids=document[None].to(model.device), use_cache=False).logits[0] for document in documents]
        if documents:
            _check_causal(model, documents[-1], alone[-1])
        why_padded = _try_packed(model, documents, alone, max_seq_length)
        if why_padded is not None:
            _restore_attention(model, before)
            pad_documents(model, _padding_id(config))
            if (difference := _difference(_together(model, documents), alone)) is not None:
                kind = config.model_type
                raise UserError(f"model type '{kind}' cannot be trained: packed, {why_padded}; padded, {difference}")
        install_supervised_loss(model)
        stock_logits = bool(documents) and not _loss_agrees(model, documents, alone)
        if stock_logits:
            use_stock_logits(model)
            if not _loss_agrees(model, documents, alone):
                raise UserError(f"model type '{config.model_type}' returns other logits for a part of the positions")
    model.train(mode)
    return CausalForm(why_padded, stock_logits)


def _can_run(model: nn.Module) -> bool:
    """Whether the weights have values, in 4 bits too, and are whole, or are within `gathered_by_block`."""
    return not any(parameter.is_meta or hasattr(parameter, "placements") for parameter in model.parameters())


def _documents(config: Any) -> list[torch.Tensor]:
    """Token ids of a few documents; one is longer than the model's windows and chunks, where these are short."""
    generator, vocabulary = torch.Generator().manual_seed(0), config.vocab_size
    windows = [getattr(config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")]
    longest = max((window for window in windows if window < LONGEST_PROBE), default=0) + PROBE_LENGTHS[0]
    return random_documents(vocabulary, (*PROBE_LENGTHS, longest), generator)


def _check_causal(model: Any, document: torch.Tensor, logits: torch.Tensor) -> None:
    """Refuse a model in which a token sees later ones, as BERT's does: it would read the answer that it predicts."""
    changed = document.clone()
    changed[-1] = changed[0]
    seen = (model(input_ids=changed[None].to(model.device), use_cache=False).logits[0, :-1] - logits[:-1]).abs().max()
    if float(seen) > ALONE_TOLERANCE.get(logits.dtype, 1e-4) * float(logits.abs().max()):
        raise UserError(
            f"model type '{model.config.model_type}' lets a token see the ones after it, so it is no causal language "
            "model as it is configured (is_decoder): choose a decoder"
        )


def _try_packed(
    model: Any, documents: Sequence[torch.Tensor], alone: Sequence[torch.Tensor], max_seq_length: int
) -> str | None:
    """Why the model cannot run packed; None where it can, and then its attention is set."""
    try:
        set_packed_attention(model)
    except UserError:
        return "its attention cannot be replaced"
    with noted_windows() as windows:
        together = _together(model, documents)
    if (difference := _difference(together, alone)) is not None:
        return difference
    return windows.lost(model.config, max_seq_length) or _leak(model, documents, cast(list[torch.Tensor], together))


def _together(model: Any, documents: Sequence[torch.Tensor]) -> list[torch.Tensor] | str:
    """The logits of each document of a row, [tokens, vocabulary], or why there are none."""
    if not documents:
        return []
    try:
        logits = model(**packed_inputs(documents, model.device, positions=True)).logits[0]
    except Exception as error:  # of whatever the model does with a row
        return f"it stops ({first_line(error)})"
    return list(logits.split([len(document) for document in documents]))


def _difference(together: Sequence[torch.Tensor] | str, alone: Sequence[torch.Tensor]) -> str | None:
    """How the documents together differ from each alone; None where they do not."""
    if isinstance(together, str):
        return together
    if not together:
        return None
    largest = max(float(expected.abs().max()) for expected in alone)
    error = max(float((a.float() - b.float()).abs().max()) for a, b in zip(together, alone, strict=True)) / largest
    if error <= ALONE_TOLERANCE.get(alone[0].dtype, 1e-4):
        return None
    return f"its logits differ from those of each document alone by {error:.2g} of the largest"


def _leak(model: Any, documents: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> str | None:
    """Whether a document of a row is changed by its neighbour, by less than `_difference` sees of new weights.

    `own` are the logits of each document of the row.
    """
    if not documents:
        return None
    other = _together(model, [documents[0], documents[1].flip(0), *documents[2:]])
    if isinstance(other, str):
        return other
    pairs = enumerate(zip(own, other, strict=True))
    change = max(float((a.float() - b.float()).abs().max()) for i, (a, b) in pairs if i != 1)
    largest = max(float(logits.abs().max()) for logits in own)
    if change <= rounding_of_neighbours(model, model.dtype) * largest:
        return None
    return "documents change each other"


def _loss_agrees(model: Any, documents: Sequence[torch.Tensor], alone: Sequence[torch.Tensor]) -> bool:
    """Whether the supervised loss is the cross-entropy of the model's own logits."""
    inputs = packed_inputs(documents, model.device, positions=True)
    row, bounds = inputs["input_ids"][0], inputs["cu_seq_lens_q"]
    supervised = torch.ones_like(row, dtype=torch.bool)
    supervised[bounds[:-1].long()] = False
    positions = supervised.nonzero()[:, 0]
    loss = float(model(**inputs, supervised_positions=positions - 1, targets=row[positions]).loss)
    expected = sum(
        float(functional.cross_entropy(logits[:-1].float(), document[1:].to(logits.device), reduction="sum"))
        for logits, document in zip(alone, documents, strict=True)
    )
    return abs(loss - expected) <= ALONE_TOLERANCE.get(alone[0].dtype, 1e-4) * abs(expected)


def _restore_attention(model: Any, name: str | None) -> None:
    """The attention that the model was loaded with; where it cannot be changed, its configuration alone says so."""
    try:
        model.set_attn_implementation(name or "eager")
    except (ValueError, ImportError):
        set_attention_of(model.config, name or "eager")


def _padding_id(config: Any) -> int:
    """What fills a line, where no attention looks: the model's padding token, or any other."""
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0
