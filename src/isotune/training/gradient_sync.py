"""How the gradients of one update travel between ranks: once an update, whatever the engine.

| engine | within an update | at its end |
|---|---|---|
| plain | | |
| DDP | `no_sync` | one all-reduce, overlapped with the last backward pass |
| FSDP2 | `set_requires_gradient_sync(False)` | one reduce-scatter, in the last backward pass |
| ZeRO 0, 1 | no accumulation boundary | one reduction |
| ZeRO 2, 3 | `coalesce_grad_reduction` (DeepSpeed 0.19) | one reduction; with `gradient_reduction: pass`, one a pass |

Coalescing keeps a whole gradient on each rank until the end of the update; `gradient_reduction: pass` keeps only a
share, for more communication. With `exact_gradients` ZeRO 1 and 2 reduce integers first, and the engine's own sum
then adds zeros to them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from isotune.io.errors import RunFault


class GradientSync:
    """Plain, DDP and FSDP2: the engines whose optimizer the Trainer steps.

    Args:
        accelerator: accelerate's.
        silent: nothing may travel, because integers are reduced instead.
    """

    def __init__(self, accelerator: Any, *, silent: bool) -> None:
        self.accelerator = accelerator
        self.silent = silent
        self.norm: float | None = None  # of the gradient, where the engine steps by itself

    @contextlib.contextmanager
    def update(self, model: nn.Module) -> Iterator[None]:
        """Hold it around all passes of an update."""
        yield

    @contextlib.contextmanager
    def one_pass(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Hold it around the forward and backward pass of one microbatch."""
        state = self.accelerator.gradient_state
        state._set_sync_gradients(last)
        try:
            with self.accelerator.no_sync(model) if self.silent or not last else contextlib.nullcontext():
                yield
        finally:
            state._set_sync_gradients(True)

    def backward(self, model: Any, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, whose shares of all ranks are averaged."""
        self.accelerator.backward(loss)

    def finish(self, model: Any) -> None:
        """After the last pass: the Trainer clips and steps."""

    def discard(self, model: Any) -> None:
        """Make the optimizer's step of this update do nothing."""
        # fp16's scaler, which fails without gradients, is not asked either
        self.accelerator.gradient_state._set_sync_gradients(False)


class ZeroGradientSync(GradientSync):
    """DeepSpeed: the engine reduces, clips and steps by itself.

    Args:
        accelerator: accelerate's.
        stage: of ZeRO.
        once: reduce once an update, where the stage would do so after each pass.
        whole_gradient: stages 1 and 2 in fp32 only: puts the whole, clipped gradient of the update into `.grad` of
            every rank and returns its norm; the engine then only shares it out, and neither averages nor clips.
    """

    def __init__(
        self, accelerator: Any, *, stage: int, once: bool, whole_gradient: Callable[[], float] | None = None
    ) -> None:
        super().__init__(accelerator, silent=False)
        self.stage = stage
        self.once = once or whole_gradient is not None
        self.whole_gradient = whole_gradient

    @contextlib.contextmanager
    def update(self, model: Any) -> Iterator[None]:
        """Stages 2 and 3 reduce after each pass unless they are asked to wait."""
        if self.whole_gradient is None and (self.stage < 2 or not self.once):
            yield
            return
        with model.coalesce_grad_reduction():
            try:
                yield
                if self.whole_gradient is not None:
                    self.norm = self.whole_gradient()
                    self._hand_out(model)
            except BaseException:
                # DeepSpeed 0.19.8 reduces on the way out of an exception too, and would wait for ranks that have none
                model._flush_coalesced_reduction_zero12 = model._flush_coalesced_reduction_zero3 = lambda optimizer: (
                    None
                )
                raise

    def _hand_out(self, model: Any) -> None:
        """Let the engine's sum over ranks be the gradient of rank 0 and zeros: exact in any order."""
        model.optimizer.gradient_average = False
        model.optimizer.clip_grad = 0.0
        if torch.distributed.get_rank() > 0:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

    @contextlib.contextmanager
    def one_pass(self, model: Any, *, last: bool) -> Iterator[None]:
        """The boundary decides where stages 0 and 1 reduce."""
        model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, model: Any, loss: torch.Tensor) -> None:
        """The engine's own: accelerate's would step right after the last pass."""
        model.backward(loss)

    def finish(self, model: Any) -> None:
        """Clip and step here, and not where the Trainer calls the optimizer.

        An update whose gradient is no number is left out and forgotten, in fp32 too: DeepSpeed's own optimizers see
        to that, and stage 0 in fp32, where torch's optimizer runs bare, is watched here.

        Raises:
            RunFault: fp16's loss scale cannot fall any further.
        """
        model.set_gradient_accumulation_boundary(True)
        if not hasattr(model.optimizer, "overflow"):
            self.norm = _norm_of(model)
            if math.isfinite(self.norm):
                model.step()
            else:
                model.zero_grad()
            return
        try:
            model.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise RunFault(
                "a gradient is not finite at fp16's smallest loss scale: bf16 or fp32 may hold it"
            ) from error
        if self.whole_gradient is None:
            self.norm = float(model.get_global_grad_norm())

    def discard(self, model: Any) -> None:
        """The engine has left it out; the schedule moves on as under every other engine."""
        if hasattr(model.optimizer, "overflow"):
            model.optimizer.overflow = False


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is no number anywhere, which makes an engine that steps by itself leave the update out."""
    return loss * math.nan


def _norm_of(model: nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
