"""What a microbatch draws depends on (seed, step) and its documents, and on nothing else."""

from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from isotune.distributed.watchdog import Watchdog
from isotune.training.failures.nonfinite import NonFinitePolicy
from isotune.training.gradients.gradient_sync import GradientSync
from isotune.training.tasks import SftTask
from isotune.training.update import OptimizerUpdate, UpdateResult, step_seed

PLACES = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 10**7))


@given(PLACES, PLACES)
def test_two_places_share_a_seed_only_where_they_are_the_same(one, other):
    assert (step_seed(*one) == step_seed(*other)) is (one == other)
    assert 0 <= step_seed(*one) < 2**63, "torch takes it"


def test_a_whole_run_has_no_seed_twice():
    assert len({step_seed(42, step) for step in range(20_000)}) == 20_000


def test_seeds_do_not_change_between_versions():
    # of blake2b("42/7") in eight bytes, by `printf 42/7 | b2sum -l 64`
    assert step_seed(42, 7) == int("bfac7f68390bc6dd", 16) >> 1


class Draws(torch.nn.Module):
    """A model of two dropout layers, whose loss says which elements they drop."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.masks: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """Two masks [1, tokens, 40]."""
        ones = self.weight.expand(1, input_ids.shape[1], 40)
        self.masks = [functional.dropout(ones, 0.5) for _ in range(2)]
        return SimpleNamespace(loss=sum(mask.sum() for mask in self.masks))


LENGTHS = {11: 3, 12: 5, 13: 2}


def drawn(step: int, *documents: int) -> dict[int, list[torch.Tensor]]:
    """What the two layers give each document of a microbatch of `step`."""
    update = OptimizerUpdate(SftTask(), GradientSync(Accelerator(cpu=True)), NonFinitePolicy(), Watchdog(60.0), seed=1)
    update.result = UpdateResult(SimpleNamespace(number=step), 1.0)
    lengths = [LENGTHS[document] for document in documents]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = {"input_ids": torch.zeros(1, sum(lengths), dtype=torch.int64), "cu_seq_lens_q": bounds}
    model = Draws()
    update.microbatch(model, {"number": 0, "weight": 1.0, "documents": documents, "inputs": inputs}, {}, last=False)
    by_layer = [mask[0].split(lengths) for mask in model.masks]
    return {document: [parts[i] for parts in by_layer] for i, document in enumerate(documents)}


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[bool]:
    """Layer by layer."""
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]


def test_what_was_drawn_before_and_the_neighbours_have_no_say():
    first = drawn(2, 11, 12, 13)
    torch.rand(1000)
    for documents in ((13, 11), (12,), (13,)):
        found = drawn(2, *documents)
        assert all(same(found[document], first[document]) == [True, True] for document in documents)


def test_layers_documents_and_steps_draw_their_own():
    first = drawn(2, 11, 12, 13)
    assert not torch.equal(*first[11])
    assert not torch.equal(first[11][0][:2], first[13][0])
    assert same(drawn(3, 11)[11], first[11]) == [False, False]
