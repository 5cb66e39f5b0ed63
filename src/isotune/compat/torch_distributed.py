"""torch 2.13: what torch.distributed, FSDP2, DTensor and tensor subclasses have no public accessor for."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def clone_default_store(prefix: str) -> Store:
    """The default process group's store, under a prefix and over a connection of its own, so any thread may use it.

    Private because torch returns no store of a group that is already initialized.
    """
    store: Any = distributed_c10d._get_default_store()
    return PrefixStore(prefix, store.clone())


def fsdp2_offloads(model: FSDPModule) -> bool:
    """Whether `fully_shard` was given a CPUOffloadPolicy; private because the module has no getter for its policy."""
    group = model._get_fsdp_state()._fsdp_param_group
    return group is not None and type(group.offload_policy).__name__ == "CPUOffloadPolicy"


def wrapper_tensor(cls: type, size: int, dtype: torch.dtype) -> Any:
    """A tensor [size] of a subclass, without data; torch documents this constructor for tensor subclasses."""
    return Tensor._make_wrapper_subclass(cls, (size,), dtype=dtype, device="cpu")  # type: ignore[attr-defined]


def global_offset(tensor: DTensor) -> tuple[int, ...]:
    """Where this rank's local tensor begins in the whole one, by dimension; DTensor has no public accessor for it."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset)
