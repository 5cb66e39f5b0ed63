"""Exact gradients of an engine that shards them, seen from one rank; test_world_sizes.py has real ranks."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from isotune.io.errors import UserError
from isotune.training.gradients.exact_shards import Fsdp2ExactGradients


@pytest.fixture
def join():
    """Makes this process a rank of so many that are not there: what they would send stays as it was."""

    def join(rank: int, ranks: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)

    yield join
    dist.destroy_process_group()


def test_the_range_is_checked_on_the_whole_gradient_and_a_rank_keeps_its_share(join: Callable[[int, int], None]):
    join(1, 2)
    model = nn.Linear(2, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    exact = Fsdp2ExactGradients(model)
    for _ in range(2):  # microbatches
        (model(torch.tensor([[10.0, -20.0]])) * torch.tensor([3.0, 2.0, 1.0])).sum().backward()
    # the largest is in the first row, which is the other rank's
    assert [bound.item() for bound in exact.largest.values()] == [2 * 60.0, 2 * 3.0]
    assert [tuple(sums.shape) for sums in exact.sums.values()] == [(1, 2), (1,)]
    assert all(parameter.grad is None for parameter in model.parameters()), "the engine sums nothing itself"


def test_after_remove_fsdp2_sums_its_gradients_itself(join: Callable[[int, int], None], monkeypatch):
    join(1, 2)
    model = nn.Linear(2, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    exact = Fsdp2ExactGradients(model)
    exact.remove()
    monkeypatch.setattr(exact, "integers", lambda gradient: pytest.fail("its reduce-scatter is still used"))
    model(torch.tensor([[10.0, -20.0]])).sum().backward()
    assert not exact.seen and all(parameter.grad is not None for parameter in model.parameters())


def test_fsdp2_over_a_part_of_the_ranks_is_refused(join: Callable[[int, int], None]):
    join(0, 4)
    replicated = nn.Linear(2, 3)
    fully_shard(replicated, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    with pytest.raises(UserError, match=r"exact_gradients: true takes FSDP2.*without parallelism_config"):
        Fsdp2ExactGradients(replicated)


def test_another_engine_than_fsdp2_is_refused():
    with pytest.raises(UserError, match=r"exact_gradients: true takes FSDP2.*fsdp_version: 2"):
        Fsdp2ExactGradients(nn.Linear(2, 3))
