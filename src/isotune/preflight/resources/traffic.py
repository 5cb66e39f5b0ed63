"""Bytes that a microbatch's kernels move and how many kernels there are, counted while the training code is traced.

A matrix product is bound by its operations or by the bytes of its factors, everything else by bytes, and a small
microbatch by the host, which launches each kernel.
"""

from dataclasses import dataclass
from typing import Any

import torch

from isotune.compat.torch import TorchDispatchMode, tree_iter

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv"}
# they read the rows that they give out, not the whole table
_LOOK_UPS = {"embedding", "index", "index_select", "gather", "slice", "select"}
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}


@dataclass(frozen=True)
class Traffic:
    """Bytes and launches of a microbatch, forward and backward."""

    product_bytes: float = 0.0  # factors and results of matrix products
    elementwise_bytes: float = 0.0  # of everything else but attention
    launches: float = 0.0

    def extrapolate(self, more: "Traffic", by: float) -> "Traffic":
        """This, and `by` times what `more` has beyond it."""
        return Traffic(
            self.product_bytes + by * (more.product_bytes - self.product_bytes),
            self.elementwise_bytes + by * (more.elementwise_bytes - self.elementwise_bytes),
            self.launches + by * (more.launches - self.launches),
        )


class TrafficCounter(TorchDispatchMode):
    """Counts what runs within it; the operators inside of attention's kernels do not come here."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs, outputs = (_tensors(values) for values in ((args, kwargs), results))
        storages = {id(tensor.untyped_storage()) for tensor in inputs}
        written = [tensor for tensor in outputs if id(tensor.untyped_storage()) not in storages]
        in_place = name.endswith("_") or "out" in (kwargs or {})
        if name in _NO_KERNEL or not (written or in_place):
            return results
        moved = sum(map(_bytes, outputs if in_place else written))
        moved += moved if name in _LOOK_UPS else sum(map(_bytes, inputs))
        products, others = self.counted.product_bytes, self.counted.elementwise_bytes
        if name in _PRODUCTS:
            products += moved
        elif "attention" not in name:
            others += moved
        self.counted = Traffic(products, others, self.counted.launches + 1)
        return results


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
