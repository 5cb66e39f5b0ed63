"""A schedule goes on where it was, also where another engine splits the parameters into other groups."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from isotune.data.batch_schedule import LAYOUT, StepSchedule
from isotune.data.packing import one_document_per_row
from isotune.io.errors import RunFault
from isotune.training.checkpointer import is_laid_out_otherwise, restore_schedule, schedule_state

STEPS = 10


def trainer(groups: int, rates: tuple[float, ...] = (0.1, 0.1)) -> Any:
    """What `schedule_state` sees of a trainer whose optimizer has that many groups; none of it is scaled."""
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(groups)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": rate} for w, rate in zip(weights, rates, strict=False)])
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    plain = {"accelerator": SimpleNamespace(scaler=None), "is_deepspeed_enabled": False}
    return SimpleNamespace(lr_scheduler=schedule, optimizer=optimizer, **plain)


def after(one: Any, steps: int) -> list[float]:
    """The learning rates of the steps that follow."""
    found = []
    for _ in range(steps):
        one.optimizer.step()
        one.lr_scheduler.step()
        found.append(one.optimizer.param_groups[-1]["lr"])
    return found


@pytest.mark.parametrize(("written", "read"), [(2, 2), (2, 1), (1, 2)])
def test_the_learning_rate_goes_on_whatever_the_groups(written, read):
    whole = after(trainer(1), STEPS)
    first = trainer(written)
    assert after(first, 4) == whole[:4]
    second = trainer(read)
    restore_schedule(second, schedule_state(first))
    assert all(group["lr"] == whole[3] for group in second.optimizer.param_groups)
    assert after(second, 4) == whole[4:8]


def test_groups_of_different_rates_cannot_become_one():
    first = trainer(2, rates=(0.1, 0.2))
    after(first, 4)
    with pytest.raises(RunFault, match="2 parameter groups"):
        restore_schedule(trainer(1), schedule_state(first))


def test_another_kind_of_schedule_is_refused():
    first, second = trainer(1), trainer(1)
    second.lr_scheduler = torch.optim.lr_scheduler.StepLR(second.optimizer, 3)
    assert isinstance(first.lr_scheduler, LambdaLR)
    with pytest.raises(RunFault, match="does not fit StepLR"):
        restore_schedule(second, schedule_state(first))


@pytest.mark.parametrize(
    ("batch", "ranks", "is_large"),
    [(1_024, 256, False), (1_032, 256, True), (1_032, None, False), (16_384, 4_096, True), (7, 3, False)],
)
def test_a_run_does_not_go_on_in_silence_with_steps_that_are_shared_out_otherwise(batch, ranks, is_large):
    lengths = np.full(20_000, 5)
    schedule = StepSchedule(
        SimpleNamespace(lengths=lengths, supervised_counts=lengths), one_document_per_row(20_000),
        global_batch_size=batch, microbatch_tokens=64, ranks=ranks, seed=0,
    )  # fmt: skip
    assert is_laid_out_otherwise({"step": 3}, schedule) == is_large
    assert not is_laid_out_otherwise({"step": 3, "layout": LAYOUT}, schedule)
