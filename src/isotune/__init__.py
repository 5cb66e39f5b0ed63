"""Fine-tuning whose result does not depend on how it was run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isotune.drop_in import SFTTrainer, Trainer, describe

__version__ = "0.1.0"
__all__ = ["SFTTrainer", "Trainer", "describe"]


def __getattr__(name: str) -> Any:
    """Import a trainer where it is first used: transformers and TRL take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from isotune import drop_in

    return getattr(drop_in, name)
