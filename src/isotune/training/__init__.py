"""Trainers that carry out a batch schedule, with the loss, gradients and checkpoints of isotune."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isotune.training.trainer import PlannedTraining, SFTTrainer, Trainer
    from isotune.training.training_plan import TrainingPlan

__all__ = ["PlannedTraining", "SFTTrainer", "Trainer", "TrainingPlan"]


def __getattr__(name: str) -> Any:
    """Import a trainer where it is first used: transformers and TRL take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from isotune.training import trainer

    return getattr(trainer, name)
