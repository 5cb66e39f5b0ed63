"""Gradients that ranks sum by themselves, after they have voted."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.launching import start_command
from torch import nn

from isotune.io.errors import RunFault
from isotune.training.gradients.gradient_sync import GradientSync

PROGRAM = """
import sys, torch, torch.distributed as dist
from types import SimpleNamespace
from torch import nn
from isotune.training.gradients import rank_sums
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
rank_sums.BUCKET = 50
torch.manual_seed(rank)
shapes = [(3, 4), (60,), (5,), (7, 6), (2,), (), (4,), (4,)]
parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
parameters[4] = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
parameters[3] = nn.Parameter(torch.zeros(6, 7).t())
for p in parameters:
    p.grad = torch.randn(p.shape).to(p.dtype)
parameters[3].grad = torch.randn(6, 7).t()
if rank == 0:
    parameters[6].grad = None  # the other has one
parameters[7].grad = None  # nobody has
before = [None if p.grad is None else p.grad.clone() for p in parameters]
rank_sums.drop_gaps(parameters, rank_sums.sum_over_ranks(parameters))
torch.save((before, [p.grad for p in parameters]), f"{folder}/gaps-{rank}.pt")
whole = parameters[:6]
for p, gradient in zip(whole, before):
    p.grad = gradient.clone()
assert rank_sums.sum_over_ranks(whole) == []
torch.save([p.grad for p in whole], f"{folder}/whole-{rank}.pt")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.of_rank_0, self.unused = (nn.Parameter(torch.full((2,), 3.0)) for _ in range(3))

    def forward(self, x):
        return (x * self.used).sum() + ((x * self.of_rank_0).sum() if rank == 0 else 0.0)


from isotune.training.gradients.gradient_sync import GradientSync

model = nn.parallel.DistributedDataParallel(Model())
accelerator = SimpleNamespace(
    distributed_type=SimpleNamespace(value="MULTI_CPU"), num_processes=2, scaler=None, device=torch.device("cpu"),
    no_sync=lambda model: model.no_sync(), unwrap_model=lambda model: model.module,
    backward=lambda loss: loss.backward(),
)
found = []
for exact in (False, True):
    sync = GradientSync(accelerator, exact=exact)
    sync.prepare(model)
    for update in range(2):
        model.zero_grad()
        with sync.update(model), sync.microbatch(model, last=True):
            sync.backward(model, model(torch.full((2,), 1.0 + rank + update)) * sync.loss_scale)
        lacks = torch.tensor(float(sync.lacks_gradients(model)))
        dist.all_reduce(lacks)
        values = sync.finish(model).tolist()
        sync.take(model, values, some_lack=bool(lacks))
        found.append([p.grad for p in model.module.parameters()])
    if exact:
        sync.exact.remove()
torch.save(found, f"{folder}/ddp-{rank}.pt")


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.full((2,), 3.0), requires_grad=own) for own in (True, False))

    def forward(self, x):
        return (x * self.first + x * self.second).sum()


found, model = [], nn.parallel.DistributedDataParallel(Both())
sync = GradientSync(accelerator)
sync.prepare(model)
sync.sums_late = False  # within the last backward
for update in range(2):
    model.zero_grad()
    sync.follow_frozen(model)
    with sync.update(model), sync.microbatch(model, last=True):
        sync.backward(model, model(torch.full((2,), 1.0 + rank + update)) * sync.loss_scale)
    sync.take(model, sync.finish(model).tolist(), some_lack=False)
    found.append([p.grad for p in model.module.parameters()])
    model.module.second.requires_grad_(True)
torch.save(found, f"{folder}/unfrozen-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks of PROGRAM have found."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [start_command([sys.executable, "-c", PROGRAM, str(rank), str(folder)]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    return folder


def test_the_sum_of_every_shape_and_type_is_that_of_the_ranks_and_nobodys_gradient_stays_none(summed: Path):
    given, found = zip(*(torch.load(summed / f"gaps-{rank}.pt") for rank in range(2)), strict=True)
    whole = [torch.load(summed / f"whole-{rank}.pt") for rank in range(2)]
    for i, (one, other) in enumerate(zip(*given, strict=True)):
        expected = other if one is None else one + other
        for sums in (*found, *([] if i > 5 else whole)):
            assert (sums[i] is None) if expected is None else torch.equal(sums[i], expected), i


def test_ddp_sums_what_a_rank_has_no_gradient_for_and_leaves_none_what_nobody_has(summed: Path):
    for rank in range(2):
        updates = torch.load(summed / f"ddp-{rank}.pt")
        assert len(updates) == 4, "two updates, to rounding and exact"
        for number, (used, of_rank_0, unused) in enumerate(updates):
            assert used.tolist() == [3.0 + 2 * (number % 2)] * 2
            assert of_rank_0.tolist() == [1.0 + number % 2] * 2
            assert unused is None


def test_ddp_sums_a_parameter_that_was_unfrozen_during_training(summed: Path):
    for rank in range(2):
        (first, second), after = torch.load(summed / f"unfrozen-{rank}.pt")
        assert first.tolist() == [3.0, 3.0] and second is None
        assert [gradient.tolist() for gradient in after] == [[5.0, 5.0]] * 2


def test_an_engine_that_shards_refuses_a_parameter_that_was_unfrozen_or_frozen_during_training():
    accelerator: Any = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"), unwrap_model=lambda model: model)
    for was in (True, False):
        model = nn.Linear(2, 2)
        model.bias.requires_grad_(was)
        sync = GradientSync(accelerator)
        sync.prepare(model)
        sync.follow_frozen(model)
        model.bias.requires_grad_(not was)
        with pytest.raises(RunFault, match="bias was frozen or unfrozen during training"):
            sync.follow_frozen(model)
