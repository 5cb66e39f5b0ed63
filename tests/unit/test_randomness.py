"""What a microbatch draws depends on (seed, step, number) and on nothing else."""

from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from isotune.distributed.ranks import Watchdog
from isotune.training.gradient_sync import GradientSync
from isotune.training.nonfinite import NonFinitePolicy
from isotune.training.tasks import SftTask
from isotune.training.update import OptimizerUpdate, UpdateResult, microbatch_seed

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


class Draws(torch.nn.Module):
    """A model whose loss is what it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, **_: Any) -> Any:
        """Five numbers, as dropout would draw them."""
        return SimpleNamespace(loss=(torch.rand(5) + self.weight).sum())


def drawn(step: int, number: int) -> float:
    """What microbatch `number` of `step` draws."""
    update = OptimizerUpdate(SftTask(), GradientSync(Accelerator(cpu=True)), NonFinitePolicy(), Watchdog(60.0), seed=1)
    update.result = UpdateResult(SimpleNamespace(number=step), 1.0)
    found: dict[int, Any] = {}
    update.microbatch(Draws(), {"number": number, "weight": 1.0, "inputs": {}}, found, last=False)
    return found[number][0].item()


def test_what_was_drawn_before_has_no_say():
    first = drawn(2, 3)
    torch.rand(1000)
    assert drawn(2, 3) == first
    assert drawn(2, 4) != first
