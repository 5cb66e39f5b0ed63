"""DeepSpeed 0.19: what its engine does on the way out of an exception."""

from typing import Any


def forget_coalesced_reduction(model: Any) -> None:
    """Let an exception leave `coalesce_grad_reduction`: 0.19.8 reduces there too, and waits for the other ranks."""
    model._flush_coalesced_reduction_zero12 = model._flush_coalesced_reduction_zero3 = lambda optimizer: None
