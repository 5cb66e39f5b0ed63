"""A device that is out of memory: smaller microbatches and the update once more, or one sentence ends the run.

Which rows share a microbatch changes rounding only. So where `microbatch_tokens: auto` chose the size, and no rank
needs another before the sum of gradients (plain and DDP), the size is halved on all ranks and the update is repeated,
with the same dropout masks: they belong to documents. Before the first step of a run on a GPU its costliest microbatch
is tried. A size that the user gave is kept, and an engine that communicates within a microbatch cannot repeat one.
Where the size may be halved, an evaluation's microbatch that does not fit is run in halves, and training keeps its own.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from isotune.data.batch_schedule import StepSchedule
from isotune.distributed.telling import tell_ranks, told_by_ranks
from isotune.io.errors import MEMORY, RankError, UserError
from isotune.models.layouts.fitting import FittingBatches, is_out_of_memory, release_memory

if TYPE_CHECKING:
    from isotune.training.training_plan import StepLoader
    from isotune.training.update import OptimizerUpdate


@dataclass(frozen=True)
class MemoryPlan:
    """What the preflight report says of a process."""

    says: Callable[[int], str]  # its figures, in words, with microbatches of so many tokens
    optimizer_bytes: int  # of the optimizer's state on the device


@dataclass(eq=False)
class OutOfMemoryPolicy:
    """Chooses smaller microbatches where it may, and explains where it may not."""

    schedules: Sequence[StepSchedule]  # of training, and that of an evaluation whose microbatches are as large
    least_tokens: int | None = None  # a microbatch is never smaller; None: no size but the given one is tried
    plan: MemoryPlan | None = None
    record: Callable[[int], None] | None = None  # what else learns of another size: the run's records
    is_main: bool = True  # this rank prints
    halves_evaluation: bool = False  # whether an evaluation's microbatch is run in halves where it does not fit
    retries: int = field(default=0, init=False)  # updates repeated so far, over all attempts of the run
    evaluation: FittingBatches = field(init=False)  # of every evaluation of this attempt

    def __post_init__(self) -> None:
        self.evaluation = FittingBatches(self.halves_evaluation)

    @property
    def halves(self) -> bool:
        """Whether another size is tried."""
        return self.least_tokens is not None

    @property
    def tokens(self) -> int:
        """The size of a microbatch now."""
        return self.schedules[0].microbatch_tokens

    def go_on(self, tokens: int, retries: int) -> None:
        """Take up the size and the count of a checkpoint, where this run's size is not given."""
        self.retries = retries
        if self.least_tokens is not None and tokens != self.tokens:
            self._resize(max(tokens, self.least_tokens))
            self._say(f"{self.tokens:,} tokens, as in the steps before the checkpoint")

    def repeat_smaller(self, number: int) -> None:
        """Step `number` ran out of memory on a rank: count it, and make its microbatches smaller.

        Every rank calls it. UserError where they are as small as they can be.
        """
        before = self.tokens
        self._halve(number, f"step {number + 1}")
        self.retries += 1
        rounding = "it changes rounding only"
        if self.schedules[0].ranks is None:  # bits are promised for a size
            rounding = f"its bits are those of {self.tokens:,} tokens from here on, to rounding those of {before:,}"
        place = f"from step {number + 1} on, which is repeated"
        self._say(f"{self.tokens:,} tokens {place}: {before:,} ran out of memory; {rounding}")

    def try_costliest(
        self, update: "OptimizerUpdate", model: nn.Module, loader: "StepLoader", steps: int, *, has_state: bool
    ) -> None:
        """Halve until the costliest microbatch of the first `steps` fits, before the first; every rank calls it.

        Beside it stand gradients, and memory as large as the optimizer's state unless it `has_state` already.
        """
        first, device = self.tokens, update.sync.accelerator.device
        beside = 0 if has_state or self.plan is None else self.plan.optimizer_bytes
        held = torch.empty(beside, dtype=torch.uint8, device=device)
        while True:
            step, microbatch = self.schedules[0].costliest(steps)
            if update.fits(model, step, loader.microbatch(microbatch)):
                break
            self._halve(step.number, "the costliest microbatch")
        del held
        release_memory()
        if self.tokens != first:
            self._say(f"{self.tokens:,} tokens: {first:,} ran out of memory when the costliest was tried")

    @contextlib.contextmanager
    def in_one_sentence(self) -> Iterator[None]:
        """Hold it around training: an error of memory that nothing has answered becomes one sentence.

        A rank may raise it alone; it tells the others, whose communication then breaks.
        """
        try:
            yield
            return
        except RuntimeError as error:
            own = is_out_of_memory(error)
            told = RankError(self._sentence("training"), prints=True, reason=MEMORY) if own else told_by_ranks()
            if told is None:
                raise
        told.prints = told.prints and tell_ranks(told)
        raise told

    def _halve(self, number: int, where: str) -> None:
        """Until the microbatches of step `number` cost less, which a smaller size alone may not bring about."""
        assert self.least_tokens is not None, "nobody votes where no other size is tried"
        costs, tokens = self._largest_cost(number), self.tokens
        while tokens > self.least_tokens:
            tokens = max(tokens // 2, self.least_tokens)
            self.schedules[0].microbatch_tokens = tokens
            if self._largest_cost(number) < costs:
                self._resize(tokens)
                return
        raise UserError(self._sentence(where), reason=MEMORY)

    def _largest_cost(self, number: int) -> float:
        return float(self.schedules[0].step(number).microbatches.costs.max())

    def _resize(self, tokens: int) -> None:
        for schedule in self.schedules:
            schedule.microbatch_tokens = tokens
        if self.record is not None:
            self.record(tokens)

    def _sentence(self, where: str) -> str:
        size, remedy = f"{self.tokens:,} tokens", "lower microbatch_tokens (in evaluation eval_microbatch_tokens), or "
        if self.tokens == self.least_tokens:
            size, remedy = f"{size}, one row", ""
        plan = f"; {self.plan.says(self.tokens)}" if self.plan is not None else ""
        return f"{where} ran out of memory with microbatches of {size}{plan}: {remedy}`isotune plan` says what fits"

    def _say(self, sentence: str) -> None:
        if self.is_main:
            tqdm.write(f"microbatch  {sentence}", file=sys.stderr)
