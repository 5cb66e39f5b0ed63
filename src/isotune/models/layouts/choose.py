"""Measures how a classifier may be given its documents: packed if that changes no logit, else padded, else one by one.

No list says which architectures can be packed. The loaded model is run on a few random documents, with its own weights,
in evaluation mode, and its logits in a layout are held to those of the stock model on each document alone. One document
is longer than the windows and blocks of the configuration, because local attention is like full attention until then.
Padded batches are held to it with dropout too, whose masks must be those of the document.
"""

import contextlib
import inspect
from typing import Any

import torch
from torch import nn

from isotune.compat.transformers import attention_of
from isotune.io.errors import UserError, first_line
from isotune.models.layouts.layout import (
    ALL,
    ALONE,
    FIRST,
    LAST,
    PADDED,
    Layout,
    alone_logits,
    on_states,
    packed_logits,
    padded_logits,
    restore_attention_type,
)
from isotune.models.layouts.probe import Probe, as_measured, is_small
from isotune.models.log_control import quiet_libraries
from isotune.models.packed_attention import PACKED, noted_windows, set_packed_attention

_known: dict[tuple, Layout] = {}  # by class, configuration and longest document, in this process


def choose_layout(model: Any, longest: int | None = None) -> Layout:
    """The layout in which a stock classifier is right, with its attention set accordingly.

    No document has more than `longest` tokens, where given. On the meta device nothing can be measured, and the layout
    is what the architecture offers. UserError where the model does not even run one document.
    """
    with quiet_libraries():  # which warn where an attention cannot be replaced
        before = attention_of(model.config) or "sdpa"
        key = (type(model), model.config.to_json_string(), longest)
        layout = _known.get(key)
        if layout is None:
            is_meta = is_empty(model)
            layout = _offered(model) if is_meta else _measured(model, longest)
            if not is_meta:
                _known[key] = layout
        model.set_attn_implementation(PACKED if layout.name == PACKED else before)
        return layout


def is_empty(model: nn.Module) -> bool:
    """Whether a model has no values to measure; some types draw a tensor of their own on the CPU all the same."""
    return any(parameter.is_meta for parameter in model.parameters())


def _measured(model: Any, longest: int | None) -> Layout:
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            found = list[Layout]()
            # noise may drown what the model's own weights show, and these may show nothing yet
            for noise in (True, False) if is_small(model) else (False,):
                torch.manual_seed(0)
                with as_measured(model, noise=noise):
                    found.append(_first_right(model, Probe(model, longest)))
            return max(found, key=lambda layout: (PACKED, PADDED, ALONE).index(layout.name))
    finally:
        restore_attention_type(model)
        model.train(training)


def _first_right(model: Any, probe: Probe) -> Layout:
    before = attention_of(model.config) or "sdpa"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"model type '{model.config.model_type}' has an encoder and a decoder, and only one of the two can be "
            "trained as a classifier: choose an encoder, such as BERT, or a decoder, such as Qwen2"
        )
    try:
        probe.expected = probe.logits(alone_logits)
    except Exception as error:  # whatever a model of transformers raises
        raise UserError(
            f"{type(model).__name__} cannot run a text of random tokens, so it cannot be trained here: "
            f"{first_line(error)}"
        ) from error
    reason, reads = _why_not_packable(model), _states_read(model, probe)
    if not reason:
        layout = Layout(PACKED, reads, _blocks(model))
        try:
            set_packed_attention(model)
            logits, remove = packed_logits(model, layout)
            try:
                with noted_windows() as windows:
                    reason = probe.difference(logits)
                reason = reason or windows.lost(model.config, probe.longest)
            finally:
                remove()
        except Exception as error:
            reason = f"it fails on packed rows: {first_line(error)}"
        finally:
            model.set_attn_implementation(before)
        if not reason:
            return layout
    shared = probe.shared_dropouts()
    for name, function in ((PADDED, padded_logits), (ALONE, alone_logits)):
        try:
            found = probe.difference(function) or probe.dropout_difference(function, shared)
        except Exception as error:
            found = f"it fails: {first_line(error)}"
        if not found:
            return Layout(name, reads, reason=reason, shared=shared)
        reason = f"{reason}; {'padding' if name == PADDED else 'one text at a time'}: {found}"
    raise UserError(f"model type '{model.config.model_type}' cannot be trained here: {reason}")


def _offered(model: Any) -> Layout:
    """The layout that the architecture offers, without a measurement."""
    reason = _why_not_packable(model)
    if reason:
        return Layout(PADDED, reason=reason)
    causal = any(getattr(module, "is_causal", False) is True for module in model.base_model.modules())
    return Layout(PACKED, LAST if causal else FIRST, _blocks(model))


def _why_not_packable(model: Any) -> str:
    before = attention_of(model.config) or "sdpa"
    try:
        set_packed_attention(model)
    except (UserError, ValueError):
        return "its attention cannot be replaced"
    finally:
        with contextlib.suppress(ValueError):
            model.set_attn_implementation(before)
    kinds = {parameter.kind for parameter in inspect.signature(model.base_model.forward).parameters.values()}
    return "" if inspect.Parameter.VAR_KEYWORD in kinds else "its base model takes no boundaries of documents"


def _blocks(model: Any) -> str:
    """Name below the base model of the module that runs the blocks: the head reads what it returns."""
    for name, module in model.base_model.named_modules():
        if any(isinstance(child, nn.ModuleList) and len(child) for child in module.children()):
            return name
    return ""


def _states_read(model: Any, probe: Probe) -> str:
    """Which states of a document the head reads: with all others at zero its logits stay the same to the bit."""
    document = probe.documents[1]
    bounds = torch.tensor([0, len(document)], dtype=torch.int32, device=document.device)

    def logits(kept: slice) -> torch.Tensor:
        def keep(states: torch.Tensor) -> torch.Tensor:
            only = torch.zeros_like(states)
            only[:, kept] = states[:, kept]
            return only

        hooks = on_states(model, _blocks(model), keep)
        try:
            return padded_logits(model, document[None], bounds, {})
        finally:
            for hook in hooks:
                hook.remove()

    with contextlib.suppress(Exception):  # states of another form are not read by place
        whole = logits(slice(None))
        for reads, kept in ((FIRST, slice(0, 1)), (LAST, slice(-1, None))):
            if torch.equal(logits(kept), whole):
                return reads
    return ALL
