"""One optimizer update, from its microbatches to the clipped gradient.

    microbatches -> forward -> loss / denominator of the global batch -> backward -> sync -> clip -> step -> record

Trainer's loop steps the optimizer and the learning rate, and `recorder` writes the update down. Engines that step by
themselves (DeepSpeed) do so at the end of `sync`. Where ranks need nothing of each other before the sum of gradients,
they tell each other first whether one of them ran out of memory; then nothing of the update is left.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from isotune.data.batch_schedule import Step, to_device
from isotune.distributed.ranks import Watchdog, gather_by_number, least_of_ranks, ordered_sum
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
from isotune.run.preemption import stop_request
from isotune.training.checkpointer import Checkpointer
from isotune.training.failures.nonfinite import NonFinitePolicy
from isotune.training.failures.out_of_memory import is_out_of_memory, release_memory
from isotune.training.gradients.gradient_sync import GradientSync
from isotune.training.tasks import Task


@dataclass
class UpdateResult:
    """What one update found."""

    step: Step  # whose microbatches it saw
    denominator: float  # what the summed loss of the global batch is divided by
    loss: float = math.nan  # of the whole global batch, the same on every rank
    count: int = 0  # the task's whole number, added up over the global batch
    grad_norm: float = math.nan  # before clipping; NaN where the update was skipped
    skipped: bool = False  # the update was left out because its loss or gradient is NaN or Inf
    out_of_memory: bool = False  # a rank's device was: there is no gradient, and the update can be repeated
    started_at: float = field(default_factory=time.perf_counter)  # seconds of `time.perf_counter`


@dataclass(eq=False)
class OptimizerUpdate:
    """Runs the updates of a schedule on this rank."""

    task: Task  # loss, denominator and count of a microbatch
    sync: GradientSync  # when and how gradients travel, and whether they are summed exactly
    nonfinite: NonFinitePolicy  # what happens when a loss or gradient is NaN or Inf
    watchdog: Watchdog  # told of every microbatch
    seed: int  # of dropout
    checkpointer: Checkpointer | None = None  # whose writer may fail
    result: UpdateResult | None = field(default=None, init=False)
    microbatches: Sequence[dict[str, Any]] = field(default=(), init=False)
    stop_agreed: bool = field(default=False, init=False)  # any rank was told to stop
    write_failed: bool = field(default=False, init=False)  # any rank could not write its last checkpoint

    def run(self, model: nn.Module, step: Step, microbatches: Sequence[dict[str, Any]]) -> UpdateResult:
        """Forward and backward of this rank's `microbatches` of `step`, and the sum of the ranks' gradients."""
        self.result, self.microbatches = UpdateResult(step, self.task.denominator(step)), microbatches
        model.train()
        self.task.begin(step, microbatches, lambda microbatch: self._look_ahead(model, microbatch))
        outputs: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        fitted = self._add_up(model, microbatches, outputs)
        if self.sync.votes:
            self._gather(model, outputs, out_of_memory=not fitted)
        if self.result.out_of_memory:
            self.sync.drop(model)
        else:
            self.sync.finish(model, skipped=self.result.skipped)
        return self.result

    def fits(self, model: nn.Module, step: Step, microbatch: dict[str, Any]) -> bool:
        """Whether every rank has the memory for this microbatch beside gradients; leaves nothing behind."""
        self.result = UpdateResult(step, self.task.denominator(step))
        model.train()
        fitted = self._add_up(model, [microbatch, microbatch], {})
        self.sync.drop(model)
        self.result = None
        return least_of_ranks(int(fitted), self.sync.accelerator.device) == 1

    def _add_up(self, model: nn.Module, microbatches: Sequence[dict[str, Any]], outputs: dict) -> bool:
        """Forward and backward of each; false where ranks vote and this one's memory did not suffice."""
        with self.sync.update(model):
            try:
                for position, microbatch in enumerate(microbatches):
                    self.microbatch(model, microbatch, outputs, last=position == len(microbatches) - 1)
                return True
            except RuntimeError as error:
                if not (self.sync.votes and is_out_of_memory(error)):
                    raise
        # outside of the block the error is gone, and with it what its frames hold
        outputs.clear()
        self.sync.drop(model)
        release_memory()
        return False

    def microbatch(self, model: nn.Module, microbatch: dict[str, Any], outputs: dict, *, last: bool) -> None:
        """One forward and backward.

        An engine may sum gradients and step in its last backward; then the losses of all ranks are looked at before it.
        """
        assert self.result is not None
        number, weight, step = microbatch["number"], microbatch["weight"], self.result.step
        with self.sync.microbatch(model, last=last), self._dropout_of(microbatch):
            inputs = self._inputs(microbatch)
            found = model(**inputs, use_cache=False)
            loss = self.task.loss(found, microbatch)
            if weight:
                outputs[number] = loss.detach(), self.task.count(found, inputs)
            del found  # what it holds beside the loss need not outlive the forward
            if last and not self.sync.votes:
                self._gather(model, outputs)
            # a loss times NaN has a NaN gradient everywhere: an engine that steps by itself leaves the update out
            scale = math.nan if self.result.skipped else weight * self.sync.loss_scale / self.result.denominator
            self.sync.backward(model, loss * scale)
        self.watchdog.progress(f"step {step.number + 1}")

    def _dropout_of(self, microbatch: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        assert self.result is not None
        torch.manual_seed(step_seed(self.seed, self.result.step.number))  # alike for all microbatches of the step
        lengths = microbatch["inputs"]["cu_seq_lens_q"].diff().tolist()
        return training_microbatch(MicrobatchDocuments(microbatch["documents"], lengths, self.task.pads))

    def _inputs(self, microbatch: dict[str, Any]) -> dict[str, Any]:
        on_device: Any = to_device(microbatch["inputs"], self.sync.accelerator.device)
        return self.task.inputs(on_device)

    @torch.no_grad()
    def _look_ahead(self, model: nn.Module, microbatch: dict[str, Any]) -> Any:
        """What the model will return for a microbatch in this update, with the same dropout, without a graph."""
        with self._dropout_of(microbatch):
            return model(**self._inputs(microbatch), use_cache=False)

    def _gather(
        self,
        model: nn.Module,
        outputs: dict[int, tuple[torch.Tensor, torch.Tensor | None]],
        *,
        out_of_memory: bool = False,  # this rank is
    ) -> None:
        """Loss and count of the global batch, and what any rank has to tell, in one collective."""
        assert self.result is not None
        count, device = len(self.result.step.microbatches), self.sync.accelerator.device
        writer = self.checkpointer.writer if self.checkpointer is not None else None
        flags = (
            stop_request.by is not None,
            writer is not None and writer.error is not None,
            out_of_memory,
            self.sync.lacks_gradients(model),
        )
        values = {number: loss for number, (loss, _) in outputs.items()}
        values |= {count + number: counted for number, (_, counted) in outputs.items() if counted is not None}
        values |= {2 * count + i: torch.ones((), device=device) for i, flag in enumerate(flags) if flag}
        table = gather_by_number(values, 2 * count + len(flags), device)
        told = [value > 0 for value in table[2 * count :]]
        self.stop_agreed, self.write_failed, self.result.out_of_memory, self.sync.some_lack_gradients = told
        if self.result.out_of_memory:
            return
        losses, self.result.count = table[:count], int(sum(table[count : 2 * count]))
        self.result.loss = ordered_sum(losses) / self.result.denominator
        broken = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if broken:
            self.nonfinite.refuse_or_skip("loss", self.result, broken[0])

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Clip the summed gradient to `max_norm` (0: not at all); returns its norm before."""
        assert self.result is not None
        if not self.result.skipped:
            self.result.grad_norm = self.sync.clip(model, max_norm)
            if not math.isfinite(self.result.grad_norm) and not self.nonfinite.is_overflow(self.sync.accelerator):
                number = self.nonfinite.find_gradient(self, model)
                self.nonfinite.refuse_or_skip("gradient", self.result, number)
                self.sync.discard(model)
        return self.result.grad_norm


def step_seed(seed: int, step: int) -> int:
    """63 bits without collisions between neighbours: randomness is counted by its place in the plan, not carried on."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
