"""Gradients that ranks sum by themselves, after they have voted."""

import sys
from pathlib import Path

import torch
from tests.launching import start_command

PROGRAM = """
import sys, torch, torch.distributed as dist
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
dist.barrier()
dist.destroy_process_group()
"""


def test_the_sum_of_every_shape_and_type_is_that_of_the_ranks_and_nobodys_gradient_stays_none(tmp_path: Path):
    ranks = [start_command([sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    given, found = zip(*(torch.load(tmp_path / f"gaps-{rank}.pt") for rank in range(2)), strict=True)
    whole = [torch.load(tmp_path / f"whole-{rank}.pt") for rank in range(2)]
    for i, (one, other) in enumerate(zip(*given, strict=True)):
        expected = other if one is None else one + other
        for sums in (*found, *([] if i > 5 else whole)):
            assert (sums[i] is None) if expected is None else torch.equal(sums[i], expected), i
