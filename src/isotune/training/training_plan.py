"""What is trained on: the plan of a run, and the loader that lays out its steps for one rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from isotune.data.batch_schedule import Microbatch, StepSchedule, collate, share_of_rank
from isotune.data.documents import Documents
from isotune.training.failures.nonfinite import NonFinitePolicy
from isotune.training.failures.out_of_memory import OutOfMemoryPolicy
from isotune.training.tasks import Task


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained on, in which steps, and how its gradients are summed."""

    schedule: StepSchedule
    documents: Any  # the prepared documents that its steps name
    task: Task  # their loss and metrics
    eval_schedule: StepSchedule | None = None
    evaluation: Any = None  # the prepared documents of the evaluation; None trains without
    exact_gradients: bool = False  # sum gradients as integers: the same bits on any number of processes
    # communicate gradients once an update; else ZeRO-2 and 3 do after each microbatch, in less memory
    reduce_once: bool = True
    loraplus_lr_ratio: float | None = None  # the learning rate of LoRA's B matrices over that of all others
    nonfinite: NonFinitePolicy | None = None  # what happens when a loss or gradient is NaN or Inf; None stops
    out_of_memory: OutOfMemoryPolicy | None = None  # what happens when a device is; None leaves it to the library


@dataclass(eq=False)
class StepLoader:
    """Iterates over the steps of an epoch and lays out this rank's microbatches, where Trainer expects a DataLoader.

    An item is a whole update, so Trainer's gradient accumulation is 1 and its count of steps is the schedule's. It has

    - `step`: the Step;
    - `microbatches`: of this rank, each a dict of `number`, `weight`, `documents` and the model's `inputs`;
    - `input_ids` and `attention_mask`: int64 [1, tokens] of this rank, by which Trainer counts tokens, of which none is
      padding, and floating-point operations.
    """

    schedule: StepSchedule
    documents: Documents
    rank: int
    world_size: int
    skipped: int = 0  # steps at the beginning of the epoch
    epoch: int = 0

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
            yield self.item(number)

    def item(self, number: int) -> dict[str, Any]:
        """Step `number` of the run, laid out by the schedule as it is now."""
        step = self.schedule.step(number)
        microbatches = [self.microbatch(m) for m in share_of_rank(step, self.world_size, self.rank)]
        own = [m["inputs"]["input_ids"] for m in microbatches if m["weight"]]
        tokens = torch.cat(own, dim=1) if own else torch.zeros(1, 0, dtype=torch.int64)
        counted = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return {"step": step, "microbatches": microbatches, **counted}

    def microbatch(self, of: Microbatch) -> dict[str, Any]:
        """One of the `microbatches` of an item."""
        return {
            "number": of.number,
            "weight": of.weight,
            "documents": of.documents,
            "inputs": collate(self.documents, of.documents),
        }
