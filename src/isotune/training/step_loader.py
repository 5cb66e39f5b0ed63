"""One item of the training loader is one optimizer update: this rank's share of a step of the plan."""

from collections.abc import Iterator
from typing import Any

import transformers.trainer
from accelerate import skip_first_batches

from isotune.data.batch_schedule import Step, StepSchedule, assign_to_ranks
from isotune.data.collate import collate
from isotune.data.documents import Documents


class StepLoader:
    """Iterates over the steps of an epoch and lays out this rank's microbatches.

    It stands where Trainer expects a DataLoader; because an item is a whole update, Trainer's accumulation is 1 and
    its count of steps is the plan's.
    """

    def __init__(self, plan: StepSchedule, documents: Documents, rank: int, world_size: int, skipped: int = 0) -> None:
        self.plan = plan
        self.documents = documents
        self.rank = rank
        self.world_size = world_size
        self.skipped = skipped
        self.epoch = 0

    def skipping(self, steps: int) -> "StepLoader":
        """This loader without the first steps of its next epoch, which are not even laid out."""
        return StepLoader(self.plan, self.documents, self.rank, self.world_size, self.skipped + steps)

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self.epoch * self.plan.steps_per_epoch
        for number in range(first + self.skipped, first + self.plan.steps_per_epoch):
            share = assign_to_ranks(self.plan.step(number), self.world_size)[self.rank]
            passes = [{"number": m.number, "weight": m.weight, "inputs": collate(self.documents, m)} for m in share]
            yield {"step": number, "passes": passes}


def documents_of(step: Step, number: int) -> tuple[int, ...]:
    """The documents of microbatch `number`, to name them when something is wrong there."""
    return next(m.documents for m in step.microbatches if m.number == number)


def _skip_first(loader: Any, steps: int) -> Any:
    return loader.skipping(steps) if isinstance(loader, StepLoader) else skip_first_batches(loader, steps)


# Trainer calls this when it resumes within an epoch, and accelerate 1.15's own knows torch's DataLoaders only.
transformers.trainer.skip_first_batches = _skip_first  # type: ignore
