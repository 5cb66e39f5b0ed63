"""Sharing out by batches and by the lightest shares first finds what looking at every thing and share finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotune.data import balance
from isotune.data.balance import deal

costs_lists = st.lists(st.integers(1, 9) | st.integers(1, 4000) | st.floats(0.5, 90.0), max_size=60)


@settings(deadline=None, max_examples=100)
@given(costs_lists, st.integers(2, 20), st.integers(1, 5))
def test_however_many_are_placed_at_once_a_step_that_is_not_large_is_laid_out_alike(costs, shares, at_once):
    values = np.array(costs, float)
    assert len(values) * shares <= balance.MANY
    expected = deal(values, shares)
    np.testing.assert_array_equal(deal(values, shares, quick=True), expected)
    with pytest.MonkeyPatch.context() as few:
        few.setattr(balance, "SHARES_AT_ONCE", at_once)
        np.testing.assert_array_equal(deal(values, shares), expected)


def lengths_costs(things: int, seed: int) -> np.ndarray:
    """Costs of documents whose lengths are like those of conversations, cut at 1,024 tokens."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(6.0, 0.85, things).round(), 2, 1_024)
    return lengths * (1 + lengths / 12_288)


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
