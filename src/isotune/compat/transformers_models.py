"""transformers 5.23: attributes of models and configurations that have no public accessor."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedConfig


def attention_of(config: PreTrainedConfig) -> str | None:
    """Name of the attention implementation in effect; the public argument `attn_implementation` cannot be read back."""
    return config._attn_implementation


def set_attention_of(config: PreTrainedConfig, name: str) -> None:
    """Set the attention implementation of a configuration whose model does not exist yet."""
    config._attn_implementation = name


def lets_attention_be_replaced(model: Any) -> bool:
    """Whether the model class calls AttentionInterface; `set_attn_implementation` does not raise where it does not."""
    return getattr(model, "_supports_attention_backend", False)


def has_sequence_classifier(config: PreTrainedConfig) -> bool:
    """Whether transformers has a sequence classifier for this model type; asked before weights are loaded."""
    return type(config) in AutoModelForSequenceClassification._model_mapping


def set_sharded_classes(model: Any, names: Sequence[str]) -> None:
    """Name the module classes that accelerate wraps one by one under FSDP2; it reads this class attribute alone."""
    model._no_split_modules = list(names)


def ignored_on_save(model: Any) -> set[str]:
    """State dict keys that `save_pretrained` leaves out."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())
