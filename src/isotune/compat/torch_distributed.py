"""torch 2.13: state of torch.distributed and FSDP2 that has no public accessor."""

from typing import Any

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule


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
