"""TRL 1.16: what its SFTTrainer does to a model that is handed to it ready for training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def trained_parameters_kept(model: nn.Module | None) -> Iterator[None]:
    """Hold it around the constructor of an SFTTrainer: the values and types of trained parameters stay as they are.

    TRL casts the adapters of a 4-bit model to bf16, for which it has no switch; precision is part of the recipe here.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else ()  # TRL may load it itself, by name
    kept = {parameter: parameter.data for parameter in parameters if parameter.requires_grad}
    yield
    for parameter, data in kept.items():
        parameter.data = data


@contextmanager
def padding_token_kept(model: Any, tokenizer: Any) -> Iterator[None]:
    """Hold it around the constructor of an SFTTrainer: a tokenizer without a pad token is left without one.

    TRL makes it the eos, in the model's configurations too, and both would be saved so; nothing here pads by it.
    """
    if tokenizer is None or getattr(tokenizer, "pad_token", "") is not None:
        yield
        return
    settings = [own for own in (model.config, getattr(model, "generation_config", None)) if own is not None]
    before = [own.pad_token_id for own in settings]
    yield
    tokenizer.pad_token = None
    for own, pad in zip(settings, before, strict=True):
        own.pad_token_id = pad
