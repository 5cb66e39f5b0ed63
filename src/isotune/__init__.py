"""Fine-tuning whose result does not depend on how it was run."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isotune.drop_in import SFTTrainer, Trainer, describe
    from isotune.notebook import Run, classify, load, sft

__version__ = "0.1.0"
__all__ = ["Run", "SFTTrainer", "Trainer", "classify", "describe", "load", "sft"]

_DROP_IN = ("SFTTrainer", "Trainer", "describe")


def __getattr__(name: str) -> Any:
    """Import a name where it is first used: the libraries behind it take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("isotune.drop_in" if name in _DROP_IN else "isotune.notebook"), name)
