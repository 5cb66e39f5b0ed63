"""The switches that make a CPU step fast without changing what it computes beyond rounding.

`enable_speedups` once after the model is built, `training_pass` around every forward and backward pass.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

from isotune.models.dropout import fast_dropout
from isotune.models.fused_lora import fuse_lora


def enable_speedups(model: nn.Module) -> None:
    """Replace what is slow in `model` by the same computation in fewer passes over memory."""
    if any(name.endswith("lora_A") for name, _ in model.named_modules()):
        fuse_lora(model)


@contextlib.contextmanager
def training_pass(model: nn.Module) -> Iterator[None]:
    """Hold it around a forward pass and its backward pass: dropout on CPU is drawn the cheap way."""
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    with fast_dropout():
        yield
