"""Checkpoints that survive anything: what is saved, when, and how a run goes on as if never stopped.

Nothing random is saved, because nothing random is carried: a microbatch draws from its place in the schedule. A run
that is told to stop saves after the current step, on all ranks together, and ends; an evaluation that was due then is
made when the run goes on, so that metrics.jsonl lacks nothing. One that is to pause at an evaluation saves after it.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from isotune.checkpoint.engine_state import EngineState, OptimizerState, reshard, state_of
from isotune.checkpoint.flat_tensors import host_copy, read_tensors
from isotune.checkpoint.manifest import Manifest, manifest_of, verify
from isotune.checkpoint.resume import STATE, TRAINER_STATE, Resumption, find_resumption
from isotune.checkpoint.store import CheckpointStore, name_of
from isotune.checkpoint.writer import TENSORS, CheckpointWriter, Snapshot
from isotune.compat.transformers import note_best_metric
from isotune.config import RunRecipe
from isotune.config.run_recipe import RESUME_NEVER
from isotune.data.batch_schedule import LAYOUT, StepSchedule
from isotune.distributed.launch import Process
from isotune.distributed.ranks import call_on_main
from isotune.io.errors import Paused, Preempted, RunFault, UserError
from isotune.io.variables import PAUSE
from isotune.run.environment import versions
from isotune.run.identity import RunIdentity
from isotune.run.metrics_file import METRICS
from isotune.run.run_dir import CHECKPOINTS, RunDir
from isotune.training.callbacks import EarlyStop

OTHER_LAYOUT = (
    "the rows of a step are shared out to the processes otherwise than by the version that wrote the checkpoint: the "
    "run goes on to rounding, not to the bit"
)
BEST = "load_best_model_at_end: "  # begins the sentences about the checkpoint that it takes
SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed 0.19


class Checkpointer(TrainerCallback):
    """Saves and resumes a run; a notebook leaves it out. It changes decisions of Trainer's own callbacks: last.

    `data_fingerprints` are by role, of the prepared data; the count of `early_stop` goes on where the run goes on.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        process: Process,
        run: RunDir,
        data_fingerprints: dict[str, str],
        early_stop: EarlyStop | None = None,
    ) -> None:
        self.recipe, self.process, self.run = recipe, process, run
        self.data_fingerprints, self.early_stop = data_fingerprints, early_stop
        limit = recipe.training_arguments.get("save_total_limit")
        self.store = CheckpointStore(run.path / CHECKPOINTS, limit, run.lease)
        self.resumption: Resumption | None = None  # what the run went on from
        self.writer: CheckpointWriter | None = None  # from the beginning of training
        self._trainer: Any = None
        self._epoch_end_done = self._evaluation_due = self._catching_up = False
        self._pause_at = int(os.environ.get(PAUSE) or 0)  # evaluations; 0: it goes on to the end

    def attach(self, trainer: Any) -> None:
        """Save and restore this trainer from now on; it says so itself."""
        self._trainer = trainer

    @property
    def resumes(self) -> bool:
        """Whether an attempt of this run goes on where one before it ended, to the same bits."""
        return self.recipe.resume != RESUME_NEVER

    # ---- the whole of training ----

    @contextlib.contextmanager
    def session(self) -> Iterator[str | None]:
        """Hold it around training: yields the checkpoint to go on from, and waits for the last one to be written."""
        self.resumption = find_resumption(self.store, self.run, self.data_fingerprints, self.process)
        if self.resumption is not None and self.run.status is not None:
            self.run.status.step = self.resumption.step
        self.writer = CheckpointWriter(self.store, self._reached)
        try:
            yield str(self.resumption.folder) if self.resumption else None
            self.writer.wait()
        except (UserError, RunFault):
            # every rank comes here together, and a checkpoint that is nearly written is worth waiting for
            with contextlib.suppress(UserError, RunFault):
                self.writer.wait()
            raise

    def wait(self) -> None:
        """Until the last checkpoint is on the disk, or its failure is told."""
        assert self.writer is not None
        self.writer.wait()

    def place(self, steps_per_epoch: int, epochs: int) -> tuple[int, int]:
        """The epoch to go on in, and its steps that are done; one whose end was not reached is entered again."""
        assert self.resumption is not None
        step, state = self.resumption.step, self.resumption.state
        if self.early_stop is not None:
            self.early_stop.early_stopping_patience_counter = state["evaluations_without_better"]
            if self.early_stop.has_stopped and state["epoch_end_done"]:
                return epochs, 0
        if state["epoch_end_done"]:
            return -(-step // steps_per_epoch), 0
        epoch = (step - 1) // steps_per_epoch
        return epoch, step - epoch * steps_per_epoch

    # ---- writing ----

    def save(self) -> None:
        """Copy the state to host memory, and leave the rest to a thread."""
        self.wait()
        assert self.writer is not None
        trainer, state = self._trainer, self._trainer.state
        self._point_at_best()
        engine = self._engine()
        # other ranks would read every local file once more
        identity = self.run.identity if self.process.is_main else RunIdentity({})
        manifest = Manifest(
            step=state.global_step,
            world_size=self.process.world_size,
            engine=type(trainer.model_wrapped).__name__,
            recipe_fingerprint=identity.fingerprint,
            recipe=self.run.recipe.result_values(),
            contents=identity.contents,
            data_fingerprints=self.data_fingerprints,
            versions=versions(),
            best_step=state.best_global_step,
            best_metric=state.best_metric,
        )
        record = {
            "step": state.global_step,
            "layout": LAYOUT,
            "epoch_end_done": self._epoch_end_done,
            "evaluation_due": self._evaluation_due,
            "skipped_steps": trainer.update.nonfinite.skipped_steps,
            "microbatch_tokens": trainer.memory.tokens,
            "out_of_memory_retries": trainer.memory.retries,
            "evaluations_without_better": self.early_stop.early_stopping_patience_counter if self.early_stop else 0,
            "optimizer": dataclasses.asdict(engine.optimizer_state()),
            **schedule_state(trainer),
            **({"metrics": trainer.recorder.state()} if trainer.recorder is not None else {}),
        }
        texts = {
            STATE: json.dumps(record, indent=1) + "\n",
            TRAINER_STATE: json.dumps(dataclasses.asdict(state), indent=1, sort_keys=True) + "\n",
            METRICS: (self.run.path / METRICS).read_text("utf-8") if self.process.is_main else "",
        }
        tensors = {**engine.model(to_read=False), **engine.optimizer(to_read=False)}
        self.writer.start(Snapshot(host_copy(tensors), texts, manifest))

    def _reached(self, step: int) -> None:
        if self.run.status is not None:
            self.run.status.reached(step)

    # ---- reading ----

    def restore(self) -> None:
        """Put the state of `resumption` into the prepared engine, however that splits it."""
        assert self.resumption is not None
        trainer, state, engine = self._trainer, self.resumption.state, self._engine()
        engine.make_optimizer_state(OptimizerState(**state["optimizer"]))
        _read(self.resumption.folder, engine, with_optimizer=True)
        restore_schedule(trainer, state)
        trainer.update.nonfinite.skipped_steps = state["skipped_steps"]
        if "microbatch_tokens" in state:  # earlier versions kept it in recipe.yaml alone
            trainer.memory.go_on(state["microbatch_tokens"], state["out_of_memory_retries"])
        if trainer.recorder is not None:
            trainer.recorder.go_on(self.resumption.metrics, state.get("metrics"))
        self._point_at_best()
        if trainer.args.load_best_model_at_end:
            call_on_main(self.process, self._check_best)
        trainer.args.eval_on_start = False
        if self.process.is_main and is_laid_out_otherwise(state, trainer.plan.schedule):
            print(f"note        {OTHER_LAYOUT}", flush=True)

    def _point_at_best(self) -> None:
        """Let Trainer's state name the checkpoint of the best evaluation, which it loads at the end.

        Of a step that was there when the run went on, it may lie in the run that the run went on from; a run that was
        moved has it under another path than recorded, of which Trainer makes None without a word.
        """
        state: TrainerState = self._trainer.state
        if not state.best_global_step:
            return
        name, resumption = name_of(state.best_global_step), self.resumption
        folder = self.store.path / name
        if resumption is not None and state.best_global_step <= resumption.step and not folder.is_dir():
            there = resumption.folder.parent / name
            folder = there if there.is_dir() else folder
        state.best_model_checkpoint = str(folder)

    def _check_best(self) -> None:
        """UserError where the best evaluation so far has no valid checkpoint: it could not be the final model."""
        state: TrainerState = self._trainer.state
        assert self.resumption is not None
        if state.best_model_checkpoint is None:
            return
        if (best := Path(state.best_model_checkpoint)).is_dir():
            if best != self.resumption.folder:  # of which every byte has just been read
                manifest_of(best, verify, BEST)
            return
        places = " or ".join(dict.fromkeys(map(str, (self.store.path, self.resumption.folder.parent))))
        raise UserError(
            f"{BEST}the best evaluation up to {self.resumption.folder} is of step "
            f"{state.best_global_step}, and there is no {best.name} in {places}: put it back, or "
            "choose another --output_dir and no --resume to train from the start"
        )

    def load_best(self) -> None:
        """Take the weights of the best evaluation into the model that is about to be saved."""
        self.wait()
        state: TrainerState = self._trainer.state
        folder = Path(str(state.best_model_checkpoint))
        self._trainer.watchdog.enter("the loading of the best checkpoint")  # its main process reads all of it first
        call_on_main(self.process, lambda: manifest_of(folder, verify, BEST))
        _read(folder, self._engine(), with_optimizer=False)
        if self.process.is_main:
            print(f"best        step {state.best_global_step}: {state.best_metric:.6g}, from {folder}")

    def _engine(self) -> EngineState:
        trainer, wrapped = self._trainer, self._trainer.model_wrapped
        optimizer = wrapped.optimizer if trainer.is_deepspeed_enabled else getattr(trainer.optimizer, "optimizer", None)
        model: Any = trainer.accelerator.unwrap_model(wrapped)
        reshard(model)  # an evaluation may have left parameters whole that the optimizer knows in shares
        return state_of(model, optimizer)

    # ---- Trainer's events ----

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where a run goes on: first the evaluation for which its last attempt had no time; then, perhaps, no step."""
        if self.resumption is not None and self.resumption.state["evaluation_due"]:
            self.resumption.state["evaluation_due"] = False
            self._catching_up = True
            note_best_metric(self._trainer, self._trainer.evaluate())
            self._point_at_best()  # the checkpoint of this step is there, and none need follow
            self._catching_up = False
        stopped = self.early_stop is not None and self.early_stop.has_stopped
        if stopped:
            control.should_training_stop = True
        if stopped or state.global_step >= state.max_steps:  # only the end of the last epoch is left
            kwargs["train_dataloader"].skip_to_end()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell of a checkpoint that could not be written; where a stop is agreed, save and do nothing else."""
        update = self._trainer.update
        self._epoch_end_done = False
        if update.write_failed:
            self.wait()
        self._evaluation_due = update.stop_agreed and control.should_evaluate
        if update.stop_agreed:
            control.should_evaluate, control.should_save = False, True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What is saved from now on lacks nothing of the epoch."""
        self._epoch_end_done = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The best so far is saved whenever it comes; end by Paused at the evaluation that is the last for now."""
        evaluations = {line["step"] for line in state.log_history if "eval_loss" in line and line["step"]}
        goes_on = state.global_step < state.max_steps and not control.should_training_stop
        if 0 < self._pause_at <= len(evaluations) and goes_on:
            note_best_metric(self._trainer, kwargs["metrics"])
            if not self._catching_up:  # else the checkpoint of this step is there, and lacks the evaluation alone
                self.save()
            self.wait()
            raise Paused(f"paused after step {state.global_step}, at evaluation {len(evaluations)}")
        if self._catching_up or args.metric_for_best_model is None or args.save_strategy == SaveStrategy.NO:
            return
        value = kwargs["metrics"][f"eval_{args.metric_for_best_model.removeprefix('eval_')}"]
        worst = -math.inf if args.greater_is_better else math.inf
        best = worst if state.best_metric is None else state.best_metric
        is_best = value > best if args.greater_is_better else value < best
        control.should_save = control.should_save or is_best

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End by Preempted where a stop was agreed, once the checkpoint is on the disk."""
        if self._trainer.update.stop_agreed:
            self.wait()
            folder = self.store.path / name_of(state.global_step)
            raise Preempted(f"stopped after step {state.global_step}: {self.recipe.again} goes on from {folder}")


@torch.no_grad()
def _read(folder: Path, engine: EngineState, *, with_optimizer: bool) -> None:
    tensors = engine.model(to_read=True)
    if with_optimizer:
        tensors |= engine.optimizer(to_read=True)
    try:
        read_tensors(folder / TENSORS, tensors)
    except RuntimeError as error:
        raise RunFault(f"the checkpoint does not fit what was built from its own recipe: {error}") from error
    engine.after_reading()


def is_laid_out_otherwise(state: dict[str, Any], schedule: StepSchedule) -> bool:
    """Whether the version that wrote a checkpoint shares the rows of this run's steps out in another way."""
    return state.get("layout", 1) != LAYOUT and schedule.is_large


def schedule_state(trainer: Any) -> dict[str, Any]:
    """The learning rate's schedule and fp16's loss scale after a step, in numbers that JSON holds."""
    return {"scheduler": _scheduler(trainer).state_dict(), "scaler": _capture_scaler(trainer)}


def restore_schedule(trainer: Any, state: dict[str, Any]) -> None:
    """Put it back, and the learning rate into the optimizer's groups; RunFault for a schedule of another kind."""
    scheduler = _scheduler(trainer)
    wanted = scheduler.state_dict()
    if wanted.keys() != state["scheduler"].keys():
        raise RunFault(f"the checkpoint's schedule does not fit {type(scheduler).__name__}")
    rates = state["scheduler"]["_last_lr"]
    groups = scheduler.optimizer.param_groups
    # an engine may split the groups in another way; a schedule gives all of them the same factor of the same rate
    if len(rates) != len(groups):
        if len(set(rates)) != 1:
            raise RunFault(f"the checkpoint has {len(rates)} parameter groups, and the optimizer {len(groups)}")
        rates = rates[:1] * len(groups)
    # what belongs to a group is the recipe's own: its highest rate, and the function of the step
    own = {name: wanted[name] for name in ("base_lrs", "lr_lambdas") if name in wanted}
    scheduler.load_state_dict({**state["scheduler"], "_last_lr": rates, **own})
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    _restore_scaler(trainer, state["scaler"])


def _scheduler(trainer: Any) -> LRScheduler:
    scheduler = trainer.lr_scheduler
    while not isinstance(scheduler, LRScheduler):
        scheduler = scheduler.scheduler  # accelerate's and DeepSpeed's wrappers
    return scheduler


def _capture_scaler(trainer: Any) -> dict[str, Any] | None:
    if trainer.accelerator.scaler is not None:
        state = trainer.accelerator.scaler.state_dict()
        return {"scale": state.get("scale"), "torch": state} if state else None
    if (scaler := _deepspeed_scaler(trainer)) is None:
        return None
    return {"scale": scaler.cur_scale, "deepspeed": {k: getattr(scaler, k) for k in SCALER_KEYS if hasattr(scaler, k)}}


def _restore_scaler(trainer: Any, state: dict[str, Any] | None) -> None:
    """The scaler's whole state, or from another engine's only its scale."""
    if state is None:
        return
    if trainer.accelerator.scaler is not None:
        own = trainer.accelerator.scaler.state_dict()
        trainer.accelerator.scaler.load_state_dict(state.get("torch", {**own, "scale": state["scale"]}))
    elif (scaler := _deepspeed_scaler(trainer)) is not None:
        for name, value in state.get("deepspeed", {"cur_scale": state["scale"]}).items():
            setattr(scaler, name, value)


def _deepspeed_scaler(trainer: Any) -> Any:
    if not (trainer.is_deepspeed_enabled and trainer.args.fp16):
        return None
    return getattr(trainer.model_wrapped.optimizer, "loss_scaler", None)
