"""torch 2.13: what a sharded checkpoint needs of tensor subclasses and DTensor."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def wrapper_tensor(cls: type, size: int, dtype: torch.dtype) -> Any:
    """A tensor [size] of a subclass, without data; torch documents this constructor for tensor subclasses."""
    return Tensor._make_wrapper_subclass(cls, (size,), dtype=dtype, device="cpu")  # type: ignore[attr-defined]


def global_offset(tensor: DTensor) -> tuple[int, ...]:
    """Where this rank's local tensor begins in the whole one, by dimension; DTensor has no public accessor for it."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset)
