"""Rows are shared out evenly, and come together whole or not at all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.evaluation import distributed_eval as module
from isotune.evaluation.distributed_eval import Ranks
from isotune.io.errors import RunFault


def of(rank: int, world_size: int) -> Ranks:
    return Ranks(rank, world_size, torch.device("cpu"))


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 6))
def test_every_item_is_carried_out_once_and_loads_differ_by_one_item_at_most(costs, world_size):
    shares = [of(rank, world_size).share(costs) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_rows_come_together_in_order_and_a_rank_may_have_none(monkeypatch):
    monkeypatch.setattr(module, "gather_object", lambda mine: [{4: "e", 0: "a"}, {}, *mine])
    found = of(2, 3).gather({2: "c"})
    assert list(found.items()) == [(0, "a"), (2, "c"), (4, "e")]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({0: "a", 1: "b"}, "row 1 came from two processes"),
        ({0: "a"}, "2 rows of 3 were evaluated: row 2 came from no process"),
        ({0: "a", 2: "c", 9: "x"}, "rows beyond the 3"),
    ],
)
def test_a_row_twice_or_missing_is_a_fault(monkeypatch, others, said):
    monkeypatch.setattr(module, "gather_object", lambda mine: [others, *mine])
    with pytest.raises(RunFault, match=said):
        of(1, 2).gather({1: "b"}, count=3)


def test_a_process_that_is_missing_is_a_fault(monkeypatch):
    monkeypatch.setattr(module, "gather_object", lambda mine: mine)
    with pytest.raises(RunFault, match="1 processes of 2"):
        of(1, 2).gather({1: "b"})
