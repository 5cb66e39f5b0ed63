"""How the gradients of one update travel between ranks: once an update, whatever the engine.

| engine | within an update | at its end |
|---|---|---|
| plain | | |
| DDP | `no_sync` | one all-reduce, overlapped with the last backward; after it where ranks vote or gradients may lack |
| FSDP2 | `set_requires_gradient_sync(False)` | one reduce-scatter, in the last backward |
| ZeRO 0, 1 | no accumulation boundary | one reduction |
| ZeRO 2, 3 | `coalesce_grad_reduction` | one reduction (`gradient_reduction: pass`: one a microbatch) |

Coalescing keeps a whole gradient on each rank until the end of the update; `gradient_reduction: pass` keeps only a
share, for more communication. With exact gradients integers are all-reduced at the end of the update; under ZeRO 1
and 2 the engine's own sum then adds zeros to the result. FSDP2 and ZeRO-3 keep shares of integers only, so they
reduce-scatter after each microbatch (exact_shards.py).

Where ranks vote (plain and DDP), none needs another within its microbatches. One that ran out of memory adds zeros to
the sum, and the update is repeated (failures/out_of_memory.py). Under plain and DDP the host waits for the device once
an update: losses, votes and norm are read together after the sum. Only fp16's scaler has to look at the gradient first.

A parameter that no microbatch of the update used has no gradient, exact or not, and the optimizer leaves it alone.
DDP's own sum would wait for it, so it is not used where that may happen (gradient_gaps.py).
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from isotune.compat.deepspeed import add_up_in_fp32, forget_coalesced_reduction
from isotune.compat.torch import ddp_has_reduced
from isotune.distributed.ranks import several_ranks
from isotune.io.errors import RunFault
from isotune.training.gradients.exact_gradients import ExactGradients, digit_sums, exact_norm, scale_to
from isotune.training.gradients.exact_shards import Fsdp2ExactGradients, Zero3ExactGradients
from isotune.training.gradients.rank_sums import drop_gaps, sum_over_ranks


class GradientSync:
    """Plain, DDP and FSDP2: the engines whose optimizer Trainer steps."""

    def __init__(self, accelerator: Any, *, exact: bool = False, votes: bool = False) -> None:
        self.accelerator = accelerator
        self.votes = votes  # no rank needs another between the beginning of an update and the vote at its end
        self._gaps: list[Any] = []  # parameters that this rank's microbatches left without gradient
        self._norm: tuple[float, torch.Tensor] | None = None  # of the summed gradient, on the host and on the device
        self.exact: ExactGradients | None = None  # from `prepare` on
        self._were_trained: list[tuple[str, Any, bool]] = []  # every parameter, and whether it was trained then
        self._is_exact = exact
        # whether no rank holds a whole gradient after the update
        self.shards_gradients = accelerator.distributed_type.value == "FSDP"
        # DDP's ranks sum after the last backward and not within it, unless `may_overlap` and no gradient may lack
        self.sums_late = not (exact or self.shards_gradients)

    @property
    def may_overlap(self) -> bool:
        """Whether DDP may sum within the last backward, where every parameter has a gradient in every microbatch."""
        return self.sums_late and not self.votes and several_ranks()

    @property
    def loss_scale(self) -> int:
        """Of a microbatch's loss: engines average gradients over the ranks; integers, and late sums, are added up."""
        return 1 if self._is_exact or self.sums_late else self.accelerator.num_processes

    def prepare(self, model: Any) -> None:
        """Called when training begins, with the model as the engine has prepared it: its parameters may be shards."""
        whole = self.accelerator.unwrap_model(model)
        self._were_trained = [(name, p, p.requires_grad) for name, p in whole.named_parameters()]
        if self._is_exact and self.exact is None:
            self.exact = self._exact_kind()(whole)

    def follow_frozen(self, model: Any) -> None:
        """Before an update: parameters that were frozen or unfrozen since are left out of its sums, or taken in.

        RunFault under an engine that shards, which has laid out what it trains when training began.
        """
        changed = [name for name, p, was in self._were_trained if p.requires_grad != was]
        if not changed:
            return
        if self.shards_gradients:
            raise RunFault(
                f"{changed[0]} was frozen or unfrozen during training, and FSDP2 and DeepSpeed train what is trainable "
                "at its beginning: train on in a second run, or without an engine that shards"
            )
        if self.exact is not None:
            self.release()
        else:  # DDP's own sum is of what was trainable when it wrapped the model
            self.sums_late = True
        GradientSync.prepare(self, model)

    def release(self) -> None:
        """Training is over: the model's gradients are again what any other loop expects."""
        if self.exact is not None:
            self.exact.remove()
            self.exact = None

    def _exact_kind(self) -> type[ExactGradients]:
        return Fsdp2ExactGradients if self.shards_gradients else ExactGradients

    @contextlib.contextmanager
    def update(self, model: nn.Module) -> Iterator[None]:
        """Hold it around all microbatches of an update."""
        scaler = self.accelerator.scaler
        if self.exact is not None:
            self.exact.loss_scale = scaler.get_scale() if scaler is not None else 1.0
        yield

    @contextlib.contextmanager
    def microbatch(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Hold it around the forward and backward of one microbatch."""
        self.accelerator.sync_gradients = last  # accelerate itself sets it in its own data loaders only
        try:
            silent = (self.sums_late or not last) if self.exact is None else not self.exact.shards
            with self.accelerator.no_sync(model) if silent else contextlib.nullcontext():
                yield
        finally:
            self.accelerator.sync_gradients = True

    def backward(self, model: Any, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, whose shares of all ranks are averaged."""
        self.accelerator.backward(loss)

    @property
    def reads_late(self) -> bool:
        """Whether losses, votes and norm are read together, after the last backward: `finish` gives what to read."""
        return not self.shards_gradients

    def finish(self, model: Any, *, skipped: bool = False) -> torch.Tensor | None:
        """After the last microbatch: the gradient of the global batch is where the optimizer looks for it.

        Under plain and DDP the device is not waited for, and `take` must be told the values of what this returns,
        float64, the same on every rank.
        """
        if skipped:
            self.discard(model)
        elif not self.reads_late:
            if self.exact is not None:
                self.exact.reduce()
                for parameter in self.exact.lacking:  # the same on every rank, as all of them run the same modules
                    parameter.grad = None
        else:
            return self._sum_and_norm(model)
        return None

    def _sum_and_norm(self, model: Any) -> torch.Tensor:
        scaled, device, found = self.accelerator.scaler is not None, self.accelerator.device, []
        if self.exact is not None:
            found = [self.exact.add_ranks()]
            if not scaled:
                found.append(digit_sums(self.exact.gradients()))
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            if several_ranks():
                if self.sums_late:
                    self._gaps = sum_over_ranks(trained)
                elif not ddp_has_reduced(model):
                    raise RunFault(
                        "a parameter had no gradient in a microbatch, though the test before training gave it one, so "
                        "gradients were not summed; nothing of this update was kept. Report this model type"
                    )
            if not scaled:
                norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
                self._norm = math.nan, norm
                found = [norm.reshape(1)]
        where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        nothing = torch.zeros(0, dtype=torch.float64, device=where)
        return torch.cat([nothing, *(values.to(where).double() for values in found)])

    def take(self, model: Any, values: list[float], *, some_lack: bool) -> None:
        """What `finish` returned, read; `some_lack`, as voted: a rank had parameters without gradient."""
        scaled = self.accelerator.scaler is not None
        if self.exact is not None:
            count = len(self.exact.sums)
            bounds, digits = values[:count], values[count:]
            self.exact.check(bounds)
            if some_lack:
                drop_gaps(list(self.exact.sums), self.exact.lacking)
            if not scaled:
                broken = not all(map(math.isfinite, bounds))
                device = self.accelerator.device
                norm = math.nan if broken else exact_norm(digits, device, add_ranks=False)
                self._norm = norm, torch.empty(0)
            return
        if some_lack and several_ranks():
            drop_gaps([p for p in model.parameters() if p.requires_grad], self._gaps)
            self._norm = None  # without their zeros, as they were added up before
        elif self._norm is not None:
            self._norm = values[0], self._norm[1]
        self._gaps = []

    def lacks_gradients(self, model: nn.Module) -> bool:
        """Whether this rank has trained parameters without a gradient, of which the others must know."""
        if self.exact is not None:
            return len(self.exact.seen) < len(self.exact.sums)
        if not (self.sums_late and several_ranks()):
            return False
        return any(p.grad is None for p in model.parameters() if p.requires_grad)

    def drop(self, model: nn.Module) -> None:
        """Forget the gradients of this update, whole or half done, and leave the optimizer as it is."""
        self.forget()
        model.zero_grad()

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Clip the gradient to `max_norm` (0: not at all); returns its norm before, the same on every rank."""
        known, self._norm = self._norm, None
        if self.exact is not None:
            if known is not None:
                scale_to(self.exact.gradients(), known[0], max_norm or math.inf)
                return known[0]
            self.accelerator.unscale_gradients()
            return self.exact.clip(max_norm)
        if known is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm or math.inf, known[1])
            return known[0]
        return float(self.accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf))

    def discard(self, model: Any) -> None:
        """Make the optimizer's step of this update do nothing, and forget its gradients."""
        # fp16's scaler, which fails without gradients, is not asked either
        self.accelerator.sync_gradients = False
        self.forget()

    def forget(self) -> None:
        """Forget the integers of this update, and what was made of them."""
        self._norm, self._gaps = None, []
        if self.exact is not None:
            self.exact.clear()
            for parameter in self.exact.sums if self.reads_late else ():
                parameter.grad = None

    def is_finite(self, model: nn.Module) -> bool:
        """Whether the gradient summed on this rank since the last update has neither NaN nor Inf."""
        if self.exact is not None:
            return self.exact.is_finite()
        return all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


class ZeroGradientSync(GradientSync):
    """DeepSpeed: the engine reduces, clips and steps by itself.

    `once` reduces once an update where the stage would do so after each microbatch. With `exact` the gradient is
    clipped to `max_grad_norm` here. Under stages 1 and 2 (in fp32 only) every rank has it whole, and the engine only
    shares it out; under stage 3 the engine gets shares.
    """

    def __init__(self, accelerator: Any, *, once: bool, exact: bool, max_grad_norm: float) -> None:
        super().__init__(accelerator, exact=exact)
        self.stage = accelerator.state.deepspeed_plugin.zero_stage
        self.coalesces = exact or (once and self.stage >= 2)
        self.max_grad_norm, self.norm = max_grad_norm, math.nan
        self.shards_gradients, self.sums_late = True, False

    def prepare(self, model: Any) -> None:
        """Microbatches whose sum waits on this rank add up as exactly as those that are reduced one by one."""
        super().prepare(model)
        if self.coalesces:
            add_up_in_fp32(model)

    def _exact_kind(self) -> type[ExactGradients]:
        return Zero3ExactGradients if self.stage == 3 else ExactGradients

    @contextlib.contextmanager
    def update(self, model: Any) -> Iterator[None]:
        """Stages 2 and 3 reduce after each microbatch unless they are asked to wait."""
        if not self.coalesces:
            yield
            return
        with model.coalesce_grad_reduction():
            try:
                yield
                if self.exact is not None:
                    self._share_out_exact(model, self.exact)
            except BaseException:
                forget_coalesced_reduction(model)
                raise

    def _share_out_exact(self, model: Any, exact: ExactGradients) -> None:
        """Let the engine's sum over ranks be the gradient of rank 0 and zeros: exact in any order."""
        exact.reduce()
        self.norm = exact.clip(self.max_grad_norm)
        model.optimizer.clip_grad = 0.0
        if isinstance(exact, Zero3ExactGradients):
            exact.hand_over()
            return
        model.optimizer.gradient_average = False
        if torch.distributed.get_rank() > 0:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

    @contextlib.contextmanager
    def microbatch(self, model: Any, *, last: bool) -> Iterator[None]:
        """The accumulation boundary decides where stages 0 and 1 reduce."""
        model.set_gradient_accumulation_boundary(last)
        yield
        if self.exact is not None:
            self.exact.end_microbatch()

    def backward(self, model: Any, loss: torch.Tensor) -> None:
        """The engine's own: accelerate's would step right after the last microbatch."""
        model.backward(loss)

    def finish(self, model: Any, *, skipped: bool = False) -> None:
        """Clip and step here, and not where Trainer calls the optimizer.

        An update whose gradient is NaN or Inf is left out and forgotten, in fp32 too: DeepSpeed's own optimizers see
        to that, and stage 0 in fp32, where torch's optimizer runs bare, is watched here. Raises RunFault where fp16's
        loss scale cannot fall any further.
        """
        model.set_gradient_accumulation_boundary(True)
        if not hasattr(model.optimizer, "overflow"):
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.norm = float(torch.nn.utils.get_total_norm(gradients))
            if math.isfinite(self.norm):
                model.step()
            else:
                model.zero_grad()
        else:
            self._step(model)
        if skipped:
            self.discard(model)

    def _step(self, model: Any) -> None:
        try:
            model.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise RunFault(
                "a gradient is not finite at fp16's smallest loss scale: bf16 or fp32 may hold it"
            ) from error
        if self.exact is None:
            self.norm = float(model.get_global_grad_norm())

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """The engine has clipped already; returns the norm that it found."""
        return self.norm

    def discard(self, model: Any) -> None:
        """The engine has left the update out; the schedule moves on as under every other engine."""
        if hasattr(model.optimizer, "overflow"):
            model.optimizer.overflow = False
        self.forget()
