"""A loss or gradient that is NaN or Inf: the run stops and names the microbatch, or skips the whole update."""

import math
import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from isotune.data.batch_schedule import Step
from isotune.distributed.ranks import gather_by_number
from isotune.io.errors import RunFault

if TYPE_CHECKING:
    from isotune.training.update import OptimizerUpdate, UpdateResult


@dataclass(eq=False)
class NonFinitePolicy:
    """Stops or skips, as the recipe's `on_nonfinite` says."""

    action: Literal["stop", "skip"] = "stop"
    _: KW_ONLY
    fp16: bool = False  # the loss is scaled, so that an overflow is part of the method
    name_rows: Callable[[Step, int], str] | None = None  # the rows of a microbatch, given its step and number, in words
    advice: str = ""  # the end of the sentence that stops: what else could be said
    is_main: bool = True  # this rank prints
    skipped_steps: int = field(default=0, init=False)  # updates left out so far, over all attempts of the run

    def refuse_or_skip(self, what: str, result: "UpdateResult", number: int | None) -> None:
        """Stop by a RunFault, or mark the update as skipped; every rank comes here together."""
        where = f"step {result.step.number + 1}"
        if number is not None:
            where += f", microbatch {number}"
            if self.name_rows is not None:
                where += f", documents of {self.name_rows(result.step, number)}"
        if self.action == "stop":
            raise RunFault(f"the {what} of {where} is not finite{self.advice}")
        result.skipped, result.grad_norm = True, math.nan
        self.skipped_steps += 1
        if self.is_main:
            tqdm.write(f"skipped: the {what} of {where} is not finite", file=sys.stderr)

    def is_overflow(self, accelerator: Any) -> bool:
        """Whether fp16's loss scaling is to blame: the scaler skips the step and halves the scale, down to 1."""
        if not self.fp16 or accelerator.scaler is None:
            return self.fp16
        return self.action == "skip" or accelerator.scaler.get_scale() > 1.0

    def count_overflow(self, result: "UpdateResult", accelerator: Any) -> None:
        """After the optimizer's step: count it where fp16's scaler left it out."""
        if self.fp16 and not result.skipped and accelerator.optimizer_step_was_skipped:
            self.skipped_steps += 1

    def find_gradient(self, update: "OptimizerUpdate", model: nn.Module) -> int | None:
        """Run the microbatches once more, one by one, to find the one whose gradient is NaN or Inf.

        Counted randomness makes the second run the same as the first. None where an engine shards the gradients.
        """
        result = update.result
        assert result is not None
        if update.sync.shards_gradients:
            return None
        broken: dict[int, torch.Tensor] = {}
        for microbatch in update.microbatches:
            model.zero_grad()
            update.sync.forget()
            update.microbatch(model, microbatch, {}, last=False)
            if microbatch["weight"]:
                broken[microbatch["number"]] = torch.tensor(0.0 if update.sync.is_finite(model) else 1.0)
        flags = gather_by_number(broken, len(result.step.microbatches), update.sync.accelerator.device)
        return flags.index(1.0) if 1.0 in flags else None
