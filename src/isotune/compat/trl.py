"""TRL 1.16: what its SFTTrainer does to a model that is handed to it ready for training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def trained_parameters_kept(model: nn.Module) -> Iterator[None]:
    """Hold it around the constructor of an SFTTrainer: the values and types of trained parameters stay as they are.

    TRL casts the adapters of a 4-bit model to bf16, for which it has no switch; precision is part of the recipe here.
    """
    kept = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    yield
    for parameter, data in kept.items():
        parameter.data = data
