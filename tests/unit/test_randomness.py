"""What a microbatch draws depends on (seed, step, number) and on nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.training.randomness import microbatch_seed, seed_microbatch

PLACES = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 10**7), st.integers(0, 10**4))


@given(PLACES, PLACES)
def test_two_places_share_a_seed_only_where_they_are_the_same(one, other):
    assert (microbatch_seed(*one) == microbatch_seed(*other)) is (one == other)
    assert 0 <= microbatch_seed(*one) < 2**63, "torch takes it"


def test_a_whole_run_has_no_seed_twice():
    seeds = {microbatch_seed(42, step, number) for step in range(500) for number in range(40)}
    assert len(seeds) == 500 * 40


def test_seeds_do_not_change_between_versions():
    # of blake2b("42/7/3") in eight bytes, by `printf 42/7/3 | b2sum -l 64`
    assert microbatch_seed(42, 7, 3) == int("8fff78b95937ba2a", 16) >> 1


def test_what_was_drawn_before_has_no_say():
    seed_microbatch(1, 2, 3)
    first = torch.rand(5)
    torch.rand(1000)
    seed_microbatch(1, 2, 3)
    assert torch.equal(torch.rand(5), first)
    seed_microbatch(1, 2, 4)
    assert not torch.equal(torch.rand(5), first)
