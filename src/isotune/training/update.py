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

from isotune.data.batch_schedule import Step, to_device_together
from isotune.distributed.ranks import add_vectors, least_of_ranks, ordered_sum, several_ranks
from isotune.distributed.watchdog import Watchdog
from isotune.models.cuda.casts import kept_casts
from isotune.models.document_dropout import training_microbatch
from isotune.models.document_keys import MicrobatchDocuments
from isotune.models.layouts.fitting import is_out_of_memory, release_memory
from isotune.run.preemption import stop_request
from isotune.training.checkpointer import Checkpointer
from isotune.training.failures.nonfinite import NonFinitePolicy
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
    keeps_casts: bool = field(default=True, init=False)  # false where a forward without a graph comes before its own
    result: UpdateResult | None = field(default=None, init=False)
    microbatches: Sequence[dict[str, Any]] = field(default=(), init=False)
    stop_agreed: bool = field(default=False, init=False)  # any rank was told to stop
    write_failed: bool = field(default=False, init=False)  # any rank could not write its last checkpoint
    _moved: dict[int, Any] = field(default_factory=dict, init=False)  # inputs on the device, by id of the microbatch

    def run(self, model: nn.Module, step: Step, microbatches: Sequence[dict[str, Any]]) -> UpdateResult:
        """Forward and backward of this rank's `microbatches` of `step`, and the sum of the ranks' gradients."""
        self.result, self.microbatches = UpdateResult(step, self.task.denominator(step)), microbatches
        self.sync.follow_frozen(model)
        self._move(microbatches)
        model.train()
        outputs: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        fitted = self._begin(model, step, microbatches) and self._add_up(model, microbatches, outputs)
        if self.sync.reads_late:
            self._conclude(model, outputs, out_of_memory=not fitted)
        else:
            self.sync.finish(model, skipped=self.result.skipped)
        return self.result

    def _begin(self, model: nn.Module, step: Step, microbatches: Sequence[dict[str, Any]]) -> bool:
        """What the task has to know before the first backward; false where ranks vote and memory did not suffice."""
        fitted = True

        def outputs(microbatch: dict[str, Any]) -> Any:
            nonlocal fitted
            if not fitted:
                return None
            try:
                return self._look_ahead(model, microbatch)
            except RuntimeError as error:
                if not (self.sync.votes and is_out_of_memory(error)):
                    raise
            fitted = False
            release_memory()
            return None

        self.task.begin(step, microbatches, outputs, self.sync.accelerator.device)
        return fitted

    def _conclude(self, model: nn.Module, outputs: dict, *, out_of_memory: bool) -> None:
        """The sum over the ranks, its norm, and all that is to be known of the update: the host waits once."""
        assert self.result is not None
        if out_of_memory and not several_ranks():
            self.result.out_of_memory = True
        else:
            # a rank that ran out of memory adds zeros: the others learn of it when they have added up
            told = self._tell(model, outputs, out_of_memory=out_of_memory)
            summed = self.sync.finish(model)
            assert summed is not None, "an engine that reads late says what to read"
            values = torch.cat([told, summed]).tolist()
            some_lack = self._learn(values[: len(told)])
            if not (self.result.out_of_memory or self.result.skipped):
                self.sync.take(model, values[len(told) :], some_lack=some_lack)
        if self.result.out_of_memory:
            self.sync.drop(model)
        elif self.result.skipped:
            self.sync.discard(model)

    def fits(self, model: nn.Module, step: Step, microbatch: dict[str, Any]) -> bool:
        """Whether every rank has the memory for this microbatch beside gradients; leaves nothing behind."""
        self.result = UpdateResult(step, self.task.denominator(step))
        self._move([microbatch])
        model.train()
        fitted = self._add_up(model, [microbatch, microbatch], {})
        self.sync.drop(model)
        self.result = None
        return least_of_ranks(int(fitted), self.sync.accelerator.device) == 1

    def _add_up(self, model: nn.Module, microbatches: Sequence[dict[str, Any]], outputs: dict) -> bool:
        """Forward and backward of each; false where ranks vote and this one's memory did not suffice."""
        with self.sync.update(model), self._casts():
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

    def _casts(self) -> contextlib.AbstractContextManager[None]:
        """On a GPU the 16-bit copies of the weights are made once an update: the weights do not change within it."""
        once = self.keeps_casts and self.sync.reads_late and self.sync.accelerator.device.type == "cuda"
        return kept_casts() if once else contextlib.nullcontext()

    def microbatch(self, model: nn.Module, microbatch: dict[str, Any], outputs: dict, *, last: bool) -> None:
        """One forward and backward.

        An engine that shards may step in its last backward, so the losses of all ranks are looked at before it.
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
            if last and not self.sync.reads_late:
                self._learn(self._tell(model, outputs).tolist())
            # a loss times NaN has a NaN gradient everywhere: an engine that steps by itself leaves the update out
            scale = math.nan if self.result.skipped else weight * self.sync.loss_scale / self.result.denominator
            self.sync.backward(model, loss * scale)
        self.watchdog.progress(f"step {step.number + 1}")

    def _dropout_of(self, microbatch: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        assert self.result is not None
        torch.manual_seed(step_seed(self.seed, self.result.step.number))  # alike for all microbatches of the step
        lengths = microbatch["inputs"]["cu_seq_lens_q"].diff().tolist()
        on_device, _ = self._on_device(microbatch)
        return training_microbatch(MicrobatchDocuments(microbatch["documents"], lengths, self.task.pads, on_device))

    def _inputs(self, microbatch: dict[str, Any]) -> dict[str, Any]:
        return self.task.inputs(self._on_device(microbatch)[1])

    def _move(self, microbatches: Sequence[dict[str, Any]]) -> None:
        """Copy what an update needs to the device: once, and nothing waits for it."""
        device = self.sync.accelerator.device
        inputs: list[Any] = [dict(microbatch["inputs"]) for microbatch in microbatches]
        if device.type == "cuda":
            for microbatch, own in zip(microbatches, inputs, strict=True):
                numbers = torch.tensor(microbatch["documents"], dtype=torch.int64)
                own["for_dropout"] = torch.stack([numbers, own["cu_seq_lens_q"].diff().long()])
        moved: list[Any] = to_device_together(inputs, device)
        pairs = zip(microbatches, moved, strict=True)
        self._moved = {id(m): (own.pop("for_dropout", None), own, m) for m, own in pairs}  # kept with its id

    def _on_device(self, microbatch: dict[str, Any]) -> Any:
        """Its documents' numbers and lengths, int64 [2, documents], where dropout takes them from there; its inputs."""
        if id(microbatch) not in self._moved:
            self._move([microbatch])
        return self._moved[id(microbatch)][:2]

    @torch.no_grad()
    def _look_ahead(self, model: nn.Module, microbatch: dict[str, Any]) -> Any:
        """What the model will return for a microbatch in this update, with the same dropout, without a graph."""
        with self._dropout_of(microbatch):
            return model(**self._inputs(microbatch), use_cache=False)

    def _tell(
        self,
        model: nn.Module,
        outputs: dict[int, tuple[torch.Tensor, torch.Tensor | None]],
        *,
        out_of_memory: bool = False,  # this rank is
    ) -> torch.Tensor:
        """Loss and count of the global batch, and what any rank tells, in one collective: for `_learn`, float64."""
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
        rows = {number: value.reshape(1) for number, value in values.items()}
        return add_vectors(rows, 2 * count + len(flags), 1, device)[:, 0]

    def _learn(self, table: list[float]) -> bool:
        """Take note of what `_tell` has gathered; returns whether a rank has parameters without a gradient."""
        assert self.result is not None
        count = len(self.result.step.microbatches)
        told = [value > 0 for value in table[2 * count :]]
        self.stop_agreed, self.write_failed, self.result.out_of_memory, some_lack = told
        if not self.result.out_of_memory:
            losses, self.result.count = table[:count], int(sum(table[count : 2 * count]))
            self.result.loss = ordered_sum(losses) / self.result.denominator
            broken = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
            if broken:
                self.nonfinite.refuse_or_skip("loss", self.result, broken[0])
        return some_lack

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
