"""Sharing out by batches and by the lightest shares first finds what looking at every thing and share finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotune.data import balance
from isotune.data.balance import deal


def plainly(costs: np.ndarray, shares: int, most: int) -> np.ndarray:
    """The share of each thing: one at a time to the lightest share, then the best of all gifts and exchanges."""
    share_of, loads = np.zeros(len(costs), np.int64), np.zeros(shares)
    for thing in sorted(range(len(costs)), key=lambda thing: -costs[thing]):
        share = int(loads.argmin())
        share_of[thing] = share
        loads[share] += costs[thing]
    for _ in range(most * shares if len(costs) else 0):
        top = int(loads.argmax())
        own, others = np.flatnonzero(share_of == top), np.flatnonzero(share_of != top)
        swap = costs[own][:, None] - costs[others][None]
        after_swap = np.maximum(loads[top] - swap, loads[share_of[others]][None] + swap)
        after_gift = np.maximum(loads[top] - costs[own][:, None], loads[None] + costs[own][:, None])
        after_gift[:, top] = np.inf
        best_swap = after_swap.min() if after_swap.size else np.inf
        if min(best_swap, after_gift.min()) >= loads[top] * (1 - 1e-9):
            break
        if best_swap < after_gift.min():
            i, j = np.unravel_index(after_swap.argmin(), after_swap.shape)
            given_, taken = own[i], others[j]
            other = share_of[taken]
            share_of[given_], share_of[taken] = other, top
            moved = costs[given_] - costs[taken]
        else:
            i, other = np.unravel_index(after_gift.argmin(), after_gift.shape)
            share_of[own[i]], moved = other, costs[own[i]]
        loads[top] -= moved
        loads[other] += moved
    return share_of


costs_lists = st.lists(st.integers(1, 9) | st.integers(1, 4000) | st.floats(0.5, 90.0), max_size=60)


@settings(deadline=None, max_examples=100)
@given(costs_lists, st.integers(2, 20), st.integers(1, 5), st.booleans())
def test_the_shares_are_those_of_placing_one_at_a_time_and_looking_at_every_exchange(costs, shares, at_once, quick):
    """A step that is no larger than `MANY` is laid out as it always was, asked to be quick or not."""
    values = np.array(costs, float)
    with pytest.MonkeyPatch.context() as few:
        few.setattr(balance, "SHARES_AT_ONCE", at_once)
        found = deal(values, shares, quick=quick)
    assert len(values) * shares <= balance.MANY
    np.testing.assert_array_equal(found, plainly(values, shares, balance.MAX_SWAPS_PER_SHARE))


def lengths_costs(things: int, seed: int) -> np.ndarray:
    """Costs of documents whose lengths are like those of conversations, cut at 1,024 tokens."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(6.0, 0.85, things).round(), 2, 1_024)
    return lengths * (1 + lengths / 12_288)


@pytest.mark.parametrize(("things", "shares"), [(300, 100), (1_024, 256)])
def test_so_they_are_of_hundreds_of_shares(things, shares):
    costs = lengths_costs(things, things)
    found = deal(costs, shares, quick=True)
    np.testing.assert_array_equal(found, plainly(costs, shares, balance.MAX_SWAPS_PER_SHARE))


@pytest.mark.parametrize(("rows", "ranks"), [(4, 4_096), (4, 1_024), (8, 1_024), (64, 256)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_thousands_of_ranks_wait_2_percent_at_most_where_each_has_four_rows(rows, ranks, seed):
    costs = lengths_costs(rows * ranks, seed)
    found = deal(costs, ranks, quick=True)
    loads = np.bincount(found, costs, ranks)
    assert loads.max() / loads.mean() <= 1.02
    assert np.array_equal(found, deal(costs, ranks, quick=True)), "the same on every rank"


@settings(deadline=None, max_examples=60)
@given(costs_lists, st.integers(2, 20))
def test_a_quick_exchange_never_makes_the_costliest_share_costlier(costs, shares):
    values = np.array(costs, float)
    with pytest.MonkeyPatch.context() as always:
        always.setattr(balance, "MANY", 0)
        found = deal(values, shares, quick=True)
        always.setattr(balance, "MAX_ROUNDS", 0)
        before = deal(values, shares, quick=True)
    assert ((found >= 0) & (found < shares)).all() and len(found) == len(values)
    largest = [np.bincount(own, values, shares).max() for own in (found, before)]
    assert largest[0] <= largest[1] * (1 + 1e-12)
