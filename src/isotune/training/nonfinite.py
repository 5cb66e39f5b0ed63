"""A loss or gradient that is no number: the run stops and names the place, or leaves the whole update out."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from isotune.distributed.collectives import gather_by_number
from isotune.io.errors import RunFault
from isotune.training.checkpointing import CheckpointingTrainer
from isotune.training.step_loader import documents_of


class GuardedTrainer(CheckpointingTrainer):
    """What stands between the last backward pass of an update and its optimizer step.

    Attributes:
        skipped_steps: updates that were left out so far.
    """

    exchange: Any
    exact: Any
    skipped_steps: int
    train_data: Any
    progress: Any
    _step: Any
    _passes: Any
    _skip: bool
    _norm: float
    _run_pass: Callable[..., Any]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As the stock one; an update that is left out has nothing to clip, and DeepSpeed has clipped already."""
        if self._skip:
            return math.nan
        return self.exchange.norm if self.exchange.norm is not None else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the stock one, and an update with a gradient that is not finite is stopped or skipped."""
        if self._skip:
            return math.nan
        norm: Any = self.exchange.norm
        if norm is None:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._norm = float(norm)
        if not math.isfinite(self._norm) and not self._is_overflow():
            self._nonfinite("gradient", self._find_nonfinite_gradient(model))
            self._discard(model)
        return norm

    def _is_overflow(self) -> bool:
        """Whether fp16's loss scaling is to blame: the scaler skips the step and halves the scale, down to 1."""
        if not self.args.fp16 or self.accelerator.scaler is None:
            return self.args.fp16
        return self.recipe.on_nonfinite == "skip" or self.accelerator.scaler.get_scale() > 1.0

    def _nonfinite(self, what: str, number: int | None) -> None:
        """Stop, or drop this update, as `on_nonfinite` says; every rank comes here together."""
        where = f"step {self._step.number + 1}"
        if number is not None:
            rows = [int(self.train_data.documents.source_rows[d]) for d in documents_of(self._step, number)]
            where += (
                f", microbatch {number}, documents of rows {', '.join(map(str, rows))} of {self.recipe.dataset_name}"
            )
        if self.recipe.on_nonfinite == "stop":
            raise RunFault(f"the {what} of {where} is not finite; on_nonfinite: skip would leave such updates out")
        self._skip = True
        self._norm = math.nan
        self.skipped_steps += 1
        if self.process.is_main:
            self.progress.say(f"skipped: the {what} of {where} is not finite")

    def _discard(self, model: nn.Module) -> None:
        """Leave the weights as they are in this update, and forget its gradients."""
        self.exchange.discard(model)
        if self.exact is not None:
            self.exact.clear()

    def _find_nonfinite_gradient(self, model: nn.Module) -> int | None:
        """Run the passes of this update once more, one by one, to name the one whose gradient broke.

        Counted randomness makes the second run the same as the first.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return None
        broken = {}
        for one in self._passes:
            model.zero_grad()
            if self.exact is not None:
                self.exact.clear()
            self._run_pass(model, one, {}, {}, last=False)
            finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
            if self.exact is not None:
                finite = self.exact.is_finite()
            if one["weight"]:
                broken[one["number"]] = torch.tensor(0.0 if finite else 1.0)
        flags = gather_by_number(broken, len(self._step.microbatches), self.args.device)
        return flags.index(1.0) if 1.0 in flags else None
