"""transformers' Trainer, carrying out a plan: global denominators, counted randomness, exact sums.

What differs from the stock Trainer, and why:
- an item of the loader is one whole optimizer update, so accumulation and the scheduler cannot disagree about steps;
- every loss is a sum divided by the count of the global batch, which the plan knows: no mean of means, and no
  communication for it;
- before each pass its generators are seeded from (seed, step, microbatch number): dropout is the same on any world
  size and needs no saved state;
- losses are summed in a fixed order, and with `exact_gradients` gradients without one;
- a loss or gradient that is not finite names its step, microbatch and documents.
"""

import math
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from isotune.config import RunRecipe
from isotune.data.batch_schedule import Step, StepSchedule
from isotune.data.prepared import PreparedData
from isotune.distributed.collectives import ordered_sum
from isotune.distributed.launch import Process
from isotune.distributed.watchdog import Watchdog
from isotune.models.cpu.speedups import training_pass
from isotune.run.metrics_file import MetricsFile, peak_memory_bytes
from isotune.training.callbacks.early_stopping import EarlyStop
from isotune.training.callbacks.epoch_averages import EpochAverages
from isotune.training.callbacks.pre_train_checks import PreTrainChecks
from isotune.training.callbacks.progress import ProgressBar
from isotune.training.evaluation_loss import evaluation_loss
from isotune.training.exact_gradients import ExactGradients
from isotune.training.gradient_sync import GradientSync, ZeroGradientSync, poisoned
from isotune.training.nonfinite import GuardedTrainer
from isotune.training.randomness import seed_microbatch
from isotune.training.step_loader import StepLoader


class PlanTrainer(GuardedTrainer):
    """Carries out `plan` over `train` on this launch's processes.

    Args:
        model: patched by the models layer: its forward takes packed inputs and returns the summed loss.
        args: from `training_arguments`.
        recipe, process: what was asked, and where this process stands.
        plan, train: the steps, and the documents that they name.
        eval_plan, evaluation: the same for the evaluation loss, or None.
        exact: sum gradients as integers (plain and DDP only).
        start_up: checks and announces what is in effect, before the bar appears.

    Attributes:
        attention: what the model must attend by when training begins.
        item, target: what the plan's rows and the loss's targets are called in what is printed and written.
        training_figures: what an evaluation's line tells of the steps before it, where the kind has any.
    """

    attention = "packed"
    item, target = "rows", "supervised_tokens"
    training_figures: EpochAverages | None = None

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        recipe: RunRecipe,
        process: Process,
        plan: StepSchedule,
        train: PreparedData,
        eval_plan: StepSchedule | None,
        evaluation: PreparedData | None,
        exact: bool,
        tokenizer: Any,
        start_up: PreTrainChecks,
    ) -> None:
        self.progress = ProgressBar(quiet=bool(args.disable_tqdm))
        super().__init__(  # type: ignore[call-arg]
            model=model,
            args=args,
            eval_dataset=evaluation,  # type: ignore[arg-type]  (only asked whether there is one)
            processing_class=tokenizer,
            callbacks=[start_up, self.progress],
        )
        if recipe.early_stopping_patience is not None:
            self.early_stop = EarlyStop(recipe, self.progress.say)
            self.add_callback(self.early_stop)
        for stock in (PrinterCallback, ProgressCallback):
            self.remove_callback(stock)
        self.recipe = recipe
        self.process = process
        self.set_up_checkpoints(start_up.run, start_up.data_fingerprints)
        self.plan = plan
        self.train_data = train
        self.eval_plan = eval_plan
        self.evaluation = evaluation
        self.metrics_file: MetricsFile | None = None  # opened on the main process when training begins
        self.loss_is_scaled_for_ga = True
        self.names = {p: name for name, p in model.named_parameters()}
        self.exact = ExactGradients(model) if exact else None
        self.exchange = self._exchange()
        self.watchdog = Watchdog(recipe.training_arguments["ddp_timeout"])
        self._step: Step = plan.step(0)
        self._passes: list[dict[str, Any]] = []
        self._loss = math.nan
        self._count = 0
        self._norm = math.nan
        self._skip = False
        self._started = time.perf_counter()

    # ---- what a kind of training says for itself ----

    def denominator(self, step: Step) -> float:
        """What the summed loss of the global batch is divided by: its targets, over all ranks."""
        return step.supervised_tokens

    def count(self, found: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """A whole number of one training pass, int64 [], to be added up over the step and all ranks; None is zero.

        Args:
            found: what the model returned, with its loss.
            inputs: of the pass.
        """
        return None

    def figures(self, step: Step, count: int) -> dict[str, float]:
        """What the step's line has beside its loss, from the added counts."""
        return {}

    def measure(self) -> dict[str, float]:
        """What an evaluation finds; every rank calls it."""
        return evaluation_loss(self)

    # ---- what the stock Trainer asks for ----

    def create_accelerator_and_postprocess(self) -> None:
        """As the stock one, but fp16 on CPU really runs in fp16: accelerate 1.15 silently computes in fp32 there."""
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.accelerator.device.type == "cpu" and not self.is_deepspeed_enabled:
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def create_optimizer(self, model: Any = None) -> Any:
        """As the stock one, but fp16's scaler asks before each step: a fused optimizer would swallow an overflow.

        accelerate 1.15 then takes the step for done, so nothing counts it and the schedule moves on.
        """
        optimizer: Any = super().create_optimizer(model)
        if self.args.fp16:
            optimizer._step_supports_amp_scaling = False
        return optimizer

    def _exchange(self) -> GradientSync:
        if self.process.zero_stage is None:
            return GradientSync(self.accelerator, silent=self.exact is not None)
        once = self.recipe.gradient_reduction == "step"
        whole = self._whole_gradient if self.exact is not None else None
        return ZeroGradientSync(self.accelerator, stage=self.process.zero_stage, once=once, whole_gradient=whole)

    def _whole_gradient(self) -> float:
        """The exact gradient of the update on every rank, clipped as under plain and DDP; returns its norm."""
        assert self.exact is not None
        self.exact.reduce(self.names)
        return float(nn.utils.clip_grad_norm_(list(self.names), self.args.max_grad_norm or math.inf))

    def get_train_dataloader(self) -> Any:
        """This rank's share of every step."""
        return StepLoader(self.plan, self.train_data.documents, self.process.rank, self.process.world_size)

    def num_examples(self, dataloader: Any) -> int:
        """Rows in an epoch, for Trainer's summary."""
        return len(self.plan.rows)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """The plan knows the denominators; nothing is counted from tensors."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: Trainer's formula assumes padded batches."""
        return 0

    # ---- one optimizer update ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """All passes of this rank's share, forward and backward.

        Returns:
            the loss of the whole global batch, the same on every rank.
        """
        self._started = time.perf_counter()
        model.train()
        self._step = self.plan.step(inputs["step"])
        self._passes = self._prepare_inputs(inputs)["passes"]  # type: ignore[index]
        scaler = self.accelerator.scaler
        if self.exact is not None:
            self.exact.loss_scale = scaler.get_scale() if scaler is not None else 1.0
        self._denominator = self.denominator(self._step)
        losses: dict[int, torch.Tensor] = {}
        counts: dict[int, torch.Tensor] = {}
        self._skip = False
        with self.exchange.update(model):
            for position, one in enumerate(self._passes):
                self._run_pass(model, one, losses, counts, last=position == len(self._passes) - 1)
        self.exchange.finish(model)
        if self._skip:
            self._discard(model)
        elif self.exact is not None and not self.is_deepspeed_enabled:
            self.exact.reduce(self.names)
        return torch.tensor(self._loss, device=self.args.device)

    def _run_pass(
        self,
        model: nn.Module,
        one: dict[str, Any],
        losses: dict[int, torch.Tensor],
        counts: dict[int, torch.Tensor],
        *,
        last: bool,
    ) -> torch.Tensor:
        """One forward and backward pass, its loss and count added to the others; before the last goes back, judge them.

        An engine may step in its last backward pass, so what is wrong with the losses must be known before it.
        """
        seed_microbatch(self.recipe.seed, self._step.number, one["number"])
        # engines average gradients over the ranks, integers are added up
        shares = 1 if self.exact is not None else self.process.world_size
        factor = one["weight"] * shares / self._denominator
        with self.exchange.one_pass(model, last=last), training_pass(model):
            found = model(**one["inputs"], use_cache=False)
            loss = found.loss
            if one["weight"]:
                losses[one["number"]] = loss.detach()
                if (count := self.count(found, one["inputs"])) is not None:
                    counts[one["number"]] = count
            del found  # what it holds beside the loss need not outlive the forward pass
            if last:
                self._judge(losses, counts)
            self.exchange.backward(model, poisoned(loss) if self._skip else loss * factor)
        self.watchdog.progress(f"step {self._step.number + 1}")
        return loss.detach()

    def _judge(self, losses: dict[int, torch.Tensor], counts: dict[int, torch.Tensor]) -> None:
        """The loss of the update, from the losses of all ranks; one that is no number stops or skips the update."""
        passes = len(self._step.microbatches)
        table = self.gather_step({**losses, **{passes + number: count for number, count in counts.items()}}, 2 * passes)
        sums, self._count = table[:passes], int(sum(table[passes:]))
        self._loss = ordered_sum(sums) / self._denominator
        broken = [number for number, value in enumerate(sums) if not math.isfinite(value)]
        if broken:
            self._nonfinite("loss", broken[0])

    # ---- what is written ----

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *rest: Any, **more: Any) -> None:
        """Write the step's line before anything else is said about it."""
        if self.state.global_step > self._ended_step:
            self._record(more["learning_rate"])
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **more)

    def _record(self, learning_rate: float) -> None:
        seconds = time.perf_counter() - self._started
        step = self._step
        if self.args.fp16 and not self._skip and self.accelerator.optimizer_step_was_skipped:
            self.skipped_steps += 1
        line = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "loss": self._loss,
            **(figures := self.figures(step, self._count)),
            "grad_norm": self._norm,
            "learning_rate": learning_rate,
            self.target: step.supervised_tokens,
            "input_tokens": step.input_tokens,
            "documents": step.documents,
            "step_seconds": seconds,
            "tokens_per_second": step.input_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.args.device),
        }
        if self.args.fp16 or self.skipped_steps:
            line["skipped_steps"] = self.skipped_steps
        if self.metrics_file is not None:
            self.metrics_file.write(line)
        if self.training_figures is not None:
            self.training_figures.add(line)
        speed = {f"{self.target}_per_s": step.supervised_tokens / seconds}
        self.progress.show({"loss": self._loss, **figures}, speed, self.skipped_steps)

    # ---- evaluation ----

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # type: ignore[override]
        """Measure, write and report; returns what `measure` found."""
        found = self.measure()
        if self.training_figures is not None:
            found |= self.training_figures.take()
        if self.metrics_file is not None:
            self.metrics_file.write({"step": self.state.global_step, "epoch": self.state.epoch, **found})
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found
