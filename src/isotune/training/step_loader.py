"""One item of the training loader is one optimizer update: this rank's share of a step of the schedule."""

from collections.abc import Iterator
from typing import Any

import torch

from isotune.compat.transformers import let_trainer_skip_steps
from isotune.data.batch_schedule import StepSchedule, assign_to_ranks, collate
from isotune.data.documents import Documents

let_trainer_skip_steps()


class StepLoader:
    """Iterates over the steps of an epoch and lays out this rank's microbatches.

    It stands where Trainer expects a DataLoader. Because an item is a whole update, Trainer's gradient accumulation is
    1 and its count of steps is the schedule's. An item has

    - `step`: the Step;
    - `microbatches`: of this rank, each a dict of `number`, `weight` and the model's `inputs`;
    - `input_ids`: int64 [1, tokens] of this rank, by which Trainer counts tokens and floating-point operations.
    """

    def __init__(
        self, schedule: StepSchedule, documents: Documents, rank: int, world_size: int, skipped: int = 0
    ) -> None:
        self.schedule, self.documents, self.rank, self.world_size = schedule, documents, rank, world_size
        self.skipped, self.epoch = skipped, 0

    @property
    def dataset(self) -> Any:
        """The rows of an epoch, whose number Trainer reports."""
        return self.schedule.rows

    def skipping(self, steps: int) -> "StepLoader":
        """This loader without the first `steps` of its next epoch, which are not laid out."""
        return StepLoader(self.schedule, self.documents, self.rank, self.world_size, self.skipped + steps)

    def skip_to_end(self) -> None:
        """Leave out every step: only the end of an epoch is still to be done."""
        self.skipped = len(self)

    def __len__(self) -> int:
        return self.schedule.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self.epoch * self.schedule.steps_per_epoch
        for number in range(first + self.skipped, first + self.schedule.steps_per_epoch):
            step = self.schedule.step(number)
            share = assign_to_ranks(step, self.world_size)[self.rank]
            microbatches = [
                {"number": m.number, "weight": m.weight, "inputs": collate(self.documents, m)} for m in share
            ]
            own = [m["inputs"]["input_ids"] for m in microbatches if m["weight"]]
            tokens = torch.cat(own, dim=1) if own else torch.zeros(1, 0, dtype=torch.int64)
            yield {"step": step, "microbatches": microbatches, "input_ids": tokens}
