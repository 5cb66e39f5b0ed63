"""Which modules are a classifier's head: whatever stands outside its base model, and the base model's pooler.

They are read from the model itself, because every architecture names them differently (`score`, `classification_head`,
`pre_classifier`). A file of pretraining has no weights for them, and beside LoRA they are trained whole.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from isotune.compat.deepspeed import whole_models
from isotune.models.log_control import quiet_libraries

POOLER = "pooler"


def head_modules(model: Any) -> list[str]:
    """Names of the modules of a classifier's head that have parameters: the pooler first, then the others.

    The pooler may be below the base model; it is no part of its blocks: what it makes of their states, the head alone
    reads.
    """
    base = model.base_model
    names = [name for name, child in model.named_children() if child is not base and _has_weights(child)]
    if base is not model and _has_weights(getattr(base, POOLER, None)):
        names.insert(0, POOLER)
    return names


def is_of_head(name: str, head: Sequence[str]) -> bool:
    """Whether a parameter of a classifier is in one of the modules `head`, which are children of it or of its base."""
    child, *inner = name.split(".")
    return child in head or (POOLER in head and inner[:1] == [POOLER])


def _has_weights(module: Any) -> bool:
    return isinstance(module, torch.nn.Module) and next(module.parameters(), None) is not None


def head_of(config: PreTrainedConfig) -> list[str]:
    """`head_modules` for a configuration whose model has not been made."""
    return head_modules(_on_meta(config))


def head_rows(config: PreTrainedConfig) -> dict[str, int]:
    """The numbers that one class has in each matrix of a head that is a single linear layer, by the end of its name.

    The ends are those in a model and in a PeftModel around it.
    """
    model = _on_meta(config)
    layers = [(name, model.get_submodule(name)) for name in head_modules(model)]
    linear = {name: layer.in_features for name, layer in layers if isinstance(layer, torch.nn.Linear)}
    ends = (".weight", ".modules_to_save.default.weight")
    return {name + end: size for name, size in linear.items() for end in ends}


def pad_like_tokenizer(model: Any, pad: int | None) -> str | None:
    """Let a head that reads the last token that does not pad know which token its tokenizer pads with.

    Otherwise plain transformers refuses batches of the saved model, or reads a padding token. Returns a sentence where
    the configuration changes.
    """
    config = model.config.get_text_config()
    before = config.pad_token_id
    if pad is None or before == pad:
        return None
    config.pad_token_id = pad
    return f"the head reads the last token other than {pad}, with which the tokenizer pads; the base said {before}"


@torch.no_grad()
def reads_last_token(model: Any) -> bool:
    """Whether the head of a stock classifier looks for the last token that does not pad: only then it asks for a pad
    token where a batch has two texts."""
    config = model.config.get_text_config()
    before = config.pad_token_id
    vars(config)["pad_token_id"] = None  # past configurations that refuse to be without one, as nomic_bert's does
    try:
        model(input_ids=torch.ones(2, 1, dtype=torch.long, device=model.device))
    except Exception as error:  # whatever a model of transformers raises of so short a text
        return "padding token" in str(error)
    finally:
        vars(config)["pad_token_id"] = before
    return False


def _on_meta(config: PreTrainedConfig) -> Any:
    with quiet_libraries(), whole_models(), torch.device("meta"):  # nothing to share out
        return AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
