"""TRL 1.16: what its SFTTrainer does to a model that is handed to it ready for training."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from isotune.compat.peft import base_model_of


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
def router_coefficient_kept(model: Any) -> Iterator[None]:
    """Hold it around the constructor of an SFTTrainer: `router_aux_loss_coef` 0 is of the training, not of the model.

    TRL writes the coefficient of the training into the model's configuration, and so into the saved one.
    """
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel | PeftModel) else None
    before = getattr(config, "router_aux_loss_coef", None)
    yield
    if before is not None:
        config.router_aux_loss_coef = before  # type: ignore[union-attr]  (of a model that has one)


@contextmanager
def metrics_kept(trainer: Any) -> Iterator[None]:
    """Hold it around a call of `compute_loss` beside the training: nothing is logged, TRL's counts and means stay."""
    metrics, tokens = copy.deepcopy(getattr(trainer, "_metrics", None)), getattr(trainer, "_total_train_tokens", None)
    log = vars(trainer).get("log")
    trainer.log = lambda *_, **__: None
    try:
        yield
    finally:
        del trainer.log
        if log is not None:
            trainer.log = log
        if metrics is not None:
            trainer._metrics, trainer._total_train_tokens = metrics, tokens


def has_router_loss(model: Any, *, of_trl: bool) -> bool:
    """Whether the library adds the balancing loss of a mixture of experts, by the coefficient of the model.

    TRL does wherever there is one, transformers' Trainer where the configuration asks for the routers' logits.
    """
    config = model.config.get_text_config()
    asked = of_trl or getattr(config, "output_router_logits", False)
    if type(base_model_of(model)).__name__.endswith("ForSequenceClassification"):
        return False  # their loss has none
    return asked and hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0.0


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
