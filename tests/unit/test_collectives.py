"""Numbers from many ranks become the same list and the same sum, whoever had them."""

import itertools
import json
import math
import socket
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from tests.launching import start_command

from isotune.distributed.ranks import gather_by_number, ordered_sum

CPU = torch.device("cpu")
NUMBERS = [0.1, 1e16, -1e16, 3.7, 1e-9, 0.2]


def test_the_sum_is_the_correctly_rounded_one_in_every_order():
    true = float(sum(Fraction(x) for x in NUMBERS))
    orders = list(itertools.permutations(NUMBERS))[::37]
    assert {ordered_sum(list(order)) for order in orders} == {true}
    assert len({sum(order) for order in orders}) > 1, "plain sums differ, which is why this exists"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_stays_visible(bad):
    assert not math.isfinite(ordered_sum([1.0, bad, 2.0]))


def test_opposite_infinities_are_no_error():
    assert math.isnan(ordered_sum([math.inf, -math.inf]))


def test_one_process_gets_its_own_numbers_in_their_places():
    values = {2: torch.tensor(0.5), 0: torch.tensor([1.25])}
    assert gather_by_number(values, 4, CPU) == [1.25, 0.0, 0.5, 0.0]
    assert gather_by_number({}, 2, CPU) == [0.0, 0.0]


PROGRAM = """
import json, sys, torch, torch.distributed as dist
from isotune.distributed.ranks import gather_by_number
rank, world, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
mine = {n: torch.tensor(v, dtype=torch.float64) for n, v in enumerate(json.loads(sys.argv[5])) if n % world == rank}
print(json.dumps(gather_by_number(mine, 6, torch.device("cpu"))), file=open(f"{out}/{rank}.json", "w"))
dist.destroy_process_group()
"""


def test_three_processes_get_the_list_that_one_would(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = json.dumps(NUMBERS)
    ranks = [
        start_command([sys.executable, "-c", PROGRAM, str(rank), "3", str(port), str(tmp_path), numbers])
        for rank in range(3)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)] == [NUMBERS] * 3
