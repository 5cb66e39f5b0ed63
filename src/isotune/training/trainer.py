"""transformers' Trainer and TRL's SFTTrainer, carrying out a schedule: `PlannedTraining` is one mixin over both.

Everything that is not named here stays theirs: arguments, optimizer, learning rate, callbacks, trackers, Hub.

| overridden (transformers 5.23) | why |
|---|---|
| `__init__` | makes the parts; an item of the loader is one whole update |
| `get_train_dataloader`, `get_eval_dataloader` | the schedule decides what is seen, not a sampler |
| `get_total_train_batch_size` | the global batch is the schedule's, whatever the launch |
| `training_step` | all microbatches of an update, one denominator, one reduction (update.py) |
| `_clip_grad_norm`, `_get_grad_norm` | DeepSpeed has clipped already; a gradient that is NaN or Inf stops or skips |
| `evaluation_loop` | one exact number, one prediction a document |
| `_prepare_for_training` | a checkpoint goes into the prepared engine, however that splits it; fp16's overflows |

Only where there is a Checkpointer:

| `train`, `_init_training_state`, `_load_from_checkpoint` | which checkpoint, and which epoch and step to go on from |
| `_save_checkpoint`, `_load_best_model` | one format for every engine |

Of TRL 1.16 also `_send_telemetry`: a run tells nobody that it runs.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer

from isotune.compat.accelerate import let_scaler_check_before_step, reduce_fsdp_in_fp32, run_fp16_on_cpu
from isotune.compat.deepspeed import unrounded_masters
from isotune.compat.transformers import checkpoints_reentrantly, let_trainer_skip_steps, loss_device
from isotune.compat.trl import has_router_loss, padding_token_kept, router_coefficient_kept, trained_parameters_kept
from isotune.distributed.watchdog import Watchdog
from isotune.models.cuda.determinism import explained, use_deterministic_kernels
from isotune.training.checkpointer import Checkpointer
from isotune.training.failures.nonfinite import NonFinitePolicy
from isotune.training.failures.out_of_memory import OutOfMemoryPolicy
from isotune.training.gradients.gradient_gaps import leaves_gaps, refuse_left_out_layers
from isotune.training.gradients.gradient_sync import GradientSync, ZeroGradientSync
from isotune.training.recorder import MetricsRecorder
from isotune.training.tasks import EvaluationRun, SftTask
from isotune.training.training_plan import StepLoader, TrainingPlan
from isotune.training.update import OptimizerUpdate

let_trainer_skip_steps()


class PlannedTraining(transformers.Trainer if TYPE_CHECKING else object):
    """Stands before `transformers.Trainer`, or a class derived from it, and carries out a plan in that class's loop.

    Without a `recorder` that class writes metrics and shows progress, without a `checkpointer` it saves and resumes.
    `options` are its own. A `plan` of what that class prepares is made by a function, after it. The model must take
    packed inputs and return a summed loss.
    """

    def __init__(
        self,
        *,
        plan: TrainingPlan | Callable[[], TrainingPlan],
        recorder: MetricsRecorder | None = None,
        checkpointer: Checkpointer | None = None,
        **options: Any,
    ) -> None:
        if isinstance(plan, TrainingPlan):
            options |= {"eval_dataset": plan.evaluation, "data_collator": _already_laid_out}
        with trained_parameters_kept(options.get("model")), router_coefficient_kept(options.get("model")):
            super().__init__(**options)
        plan = plan if isinstance(plan, TrainingPlan) else plan()
        self.plan, self.recorder, self.checkpointer = plan, recorder, checkpointer
        is_main = self.args.process_index == 0
        balanced = isinstance(plan.task, SftTask) and plan.task.router_loss is not None
        if is_main and has_router_loss(self.model, of_trl=isinstance(self, TrlSFTTrainer)) and not balanced:
            print(
                "note        the routers' balancing loss (router_aux_loss_coef) is not trained, only the answers' loss"
            )
        resumes = checkpointer is not None and checkpointer.resumes
        if plan.exact_gradients or resumes:
            promise = "exact_gradients" if plan.exact_gradients else "resume"
            use_deterministic_kernels(self.args.device, promised_by=promise, is_main=is_main)
        # without a process of ours nothing watches, and progress is noted for nobody
        self.watchdog = checkpointer.process.watchdog if checkpointer is not None else Watchdog()
        self.make_update()
        if recorder is not None:
            for stock in (PrinterCallback, ProgressCallback):
                self.remove_callback(stock)
            recorder.watch(self.update, self.memory)
            self.add_callback(recorder)
        if checkpointer is not None:
            checkpointer.attach(self)
            self.add_callback(checkpointer)

    def make_update(self) -> None:
        """Make what runs the plan's updates: anew for another plan, model or accelerator."""
        plan, args = self.plan, self.args
        if args.fp16 and self.accelerator.device.type == "cpu" and not self.is_deepspeed_enabled:
            run_fp16_on_cpu(self.accelerator)
        if self.is_fsdp_enabled:
            reduce_fsdp_in_fp32(self.accelerator)
        nonfinite = plan.nonfinite or NonFinitePolicy(fp16=args.fp16, is_main=args.process_index == 0)
        self.memory = plan.out_of_memory or OutOfMemoryPolicy([plan.schedule], is_main=args.process_index == 0)
        exact = plan.exact_gradients
        if self.is_deepspeed_enabled:
            refuse_left_out_layers(cast(nn.Module, self.model))
            clipping = args.max_grad_norm
            sync = ZeroGradientSync(self.accelerator, once=plan.reduce_once, exact=exact, max_grad_norm=clipping)
        else:
            votes = self.memory.halves and not self.is_fsdp_enabled
            sync = GradientSync(self.accelerator, exact=exact, votes=votes)
        self.update = OptimizerUpdate(plan.task, sync, nonfinite, self.watchdog, args.seed, self.checkpointer)
        self.update.keeps_casts = not checkpoints_reentrantly(args, cast(nn.Module, self.model))

    # ---- what is seen ----

    def get_train_dataloader(self) -> Any:
        """This rank's share of every update."""
        state, plan = self.accelerator, self.plan
        return StepLoader(plan.schedule, plan.documents.documents, state.process_index, state.num_processes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The evaluation documents with the model, for `evaluation_loop`."""
        plan, model = self.plan, cast(nn.Module, self.model_wrapped)
        if plan.eval_schedule is None:
            raise ValueError("this run has no evaluation documents")
        step, documents = plan.eval_schedule.step(0), plan.evaluation.documents
        fitting, number = self.memory.evaluation, self.state.global_step
        return EvaluationRun(model, step, documents, self.accelerator, self.watchdog, number, fitting)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of one update over all ranks."""
        return self.plan.schedule.global_batch_size

    # ---- one optimizer update ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the recipe; with LoRA+ the B matrices have groups, and a learning rate, of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        ratio = self.plan.loraplus_lr_ratio
        if made and ratio is not None:
            named = cast(nn.Module, self.model if model is None else model).named_parameters()
            raise_learning_rate(optimizer, {id(p) for name, p in named if ".lora_B." in name}, ratio)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """All microbatches of this rank's share; returns the loss of the global batch, the same on every rank."""
        with explained():
            result = self.update.run(model, inputs["step"], inputs["microbatches"])
            while result.out_of_memory:  # on a rank; all of them know
                started_at = result.started_at
                self.memory.repeat_smaller(result.step.number)
                inputs |= self.get_train_dataloader().item(result.step.number)
                result = self.update.run(model, inputs["step"], inputs["microbatches"])
                result.started_at = started_at
        return torch.full((), result.loss, device=loss_device(self))

    def try_costliest_microbatch(self) -> None:
        """Before the first step, on a GPU, where the size of a microbatch may still be another."""
        if self.update.sync.votes and self.args.device.type == "cuda":
            has_state = bool(cast(torch.optim.Optimizer, self.optimizer).state)
            with explained():
                self.memory.try_costliest(
                    self.update,
                    cast(nn.Module, self.model_wrapped),
                    self.get_train_dataloader(),
                    self.state.max_steps,
                    has_state=has_state,
                )

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Done by `_get_grad_norm`, which Trainer calls next."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self.update.clip(model, self.args.max_grad_norm)

    # ---- evaluation ----

    def evaluation_loop(
        self, dataloader: EvaluationRun, description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """The task's metrics of the evaluation documents, and the means of training since the last evaluation."""
        metrics = self.plan.task.evaluate(dataloader)
        if self.recorder is not None and self.recorder.averages is not None:
            metrics |= self.recorder.averages.take()
        if metric_key_prefix != "eval":
            metrics = {name.replace("eval_", f"{metric_key_prefix}_", 1): value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.documents))  # type: ignore[arg-type]  (Trainer passes predictions on unread)

    # ---- where a run goes on ----

    def train(self, resume_from_checkpoint: Any = None, *options: Any, **more: Any) -> Any:
        """Train; with a Checkpointer from the checkpoint that the recipe's `resume` leads to."""
        try:
            if self.checkpointer is None:
                return super().train(resume_from_checkpoint, *options, **more)
            with self.memory.in_one_sentence(), self.checkpointer.session() as folder:
                return super().train(folder, *options, **more)
        finally:
            self.update.sync.release()  # a script may train the model on, by whatever means

    def _init_training_state(self, *arguments: Any, **more: Any) -> tuple[int, int]:
        place = super()._init_training_state(*arguments, **more)
        if self.checkpointer is None or self.checkpointer.resumption is None:
            return place
        max_steps, steps_per_epoch, epochs, *_ = arguments
        self.state.compute_steps(self.args, max_steps)  # how often to save or log may have been changed
        return self.checkpointer.place(steps_per_epoch, epochs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.checkpointer is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        ours = self.checkpointer is not None
        with self._masters_kept():
            prepared = super()._prepare_for_training(
                max_steps, train_dataloader, None if ours else resume_from_checkpoint
            )
        sync = self.update.sync
        sync.prepare(self.model_wrapped)
        if sync.may_overlap:
            sync.sums_late = leaves_gaps(self.model_wrapped, self.plan.task, self.args.device)
        if self.args.fp16 and not self.is_deepspeed_enabled:
            wrapped: Any = self.optimizer
            let_scaler_check_before_step(wrapped.optimizer)
        if self.checkpointer is not None and self.checkpointer.resumption is not None:
            self.checkpointer.restore()
        return prepared

    def _masters_kept(self) -> contextlib.AbstractContextManager:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        if dtype is None or not self.is_deepspeed_enabled:
            return contextlib.nullcontext()
        return unrounded_masters(cast(nn.Module, self.model), dtype)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.checkpointer is None:
            super()._save_checkpoint(model, trial)
        else:
            self.checkpointer.save()

    def _load_best_model(self) -> None:
        if self.checkpointer is None:
            super()._load_best_model()
        else:
            self.checkpointer.load_best()


class Trainer(PlannedTraining, transformers.Trainer):
    """`transformers.Trainer` over a plan."""


class SFTTrainer(PlannedTraining, TrlSFTTrainer):
    """`trl.SFTTrainer` over a plan; `args` must say that its data are prepared (`sft_arguments` does)."""

    def __init__(self, *, plan: TrainingPlan, **options: Any) -> None:
        documents = plan.documents.documents  # as TRL wants to be handed them, a row each, on the same memory
        tokens = pa.LargeListArray.from_arrays(pa.array(documents.starts), pa.array(documents.input_ids))
        with padding_token_kept(options["model"], options.get("processing_class")):
            super().__init__(plan=plan, train_dataset=Dataset(pa.table({"input_ids": tokens})), **options)

    def _send_telemetry(self) -> None:
        """Nothing: a run tells nobody that it runs."""


def raise_learning_rate(optimizer: torch.optim.Optimizer, chosen: set[int], ratio: float) -> None:
    """Give the parameters of these ids groups of their own, with `ratio` times the learning rate of their group."""
    for group in list(optimizer.param_groups):
        raised = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if raised:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": raised, "lr": group["lr"] * ratio})


def _already_laid_out(items: Any) -> Any:
    raise AssertionError("the loaders of a plan lay out their own items")
