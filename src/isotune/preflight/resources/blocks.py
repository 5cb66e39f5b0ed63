"""The blocks of a model by its configuration, and the same configuration with fewer of them."""

import copy
from typing import Any

from transformers import PreTrainedConfig

LAYERS = "num_hidden_layers"


def layers_of(config: PreTrainedConfig) -> int:
    """The number of blocks of the language model, which a configuration of several models has in its own part."""
    return int(getattr(config.get_text_config(), LAYERS))


def attention_size_of(config: PreTrainedConfig) -> int:
    """Heads times elements of a head; 0 for a model whose tokens do not attend to each other, such as Mamba."""
    text: Any = config.get_text_config()
    heads, size = getattr(text, "num_attention_heads", None), getattr(text, "head_dim", None)
    if not heads:
        return 0
    return heads * size if size else text.hidden_size


def with_layers(config: PreTrainedConfig, layers: int | None) -> PreTrainedConfig | None:
    """A copy with so many of its first blocks, or all for None; None where the type computes their number itself.

    What a configuration lists by block is cut: kinds of layers, windows. What it derives from their number follows.
    """
    smaller = copy.deepcopy(config)
    if layers is None or layers == layers_of(config):
        return smaller
    text: Any = smaller.get_text_config()
    before = layers_of(config)
    try:
        setattr(text, LAYERS, layers)
    except (AttributeError, NotImplementedError):  # Funnel: of its groups of blocks
        return None
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == before:
            setattr(text, name, value[:layers])
    return smaller if layers_of(smaller) == layers else None
