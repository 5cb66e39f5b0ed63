"""Trainer with checkpoints that survive anything: what is saved, when, and how a run goes on as if never stopped.

Nothing random is saved, because nothing random is carried: a microbatch draws from its place in the plan. What differs
from the stock Trainer:
- a checkpoint is one format for every engine (see `checkpoints.engine_state`), without a pickle in it;
- it is written behind training's back, and appears by one rename when it is whole;
- a run that is told to stop saves after the current step, on all ranks together, and ends;
- an evaluation that was due when a run stopped is made when it goes on, so metrics.jsonl lacks nothing.
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from isotune.checkpoint.engine_state import EngineState, OptimizerState
from isotune.checkpoint.flat_tensors import host_copy, read_tensors
from isotune.checkpoint.manifest import Manifest
from isotune.checkpoint.resume import STATE, TRAINER_STATE, Resumption, find_resumption
from isotune.checkpoint.store import CheckpointStore, name_of
from isotune.checkpoint.unshard import reshard
from isotune.checkpoint.writer import TENSORS, CheckpointWriter, Snapshot
from isotune.checkpoint.zero import state_of
from isotune.config import RunRecipe
from isotune.distributed.collectives import gather_by_number
from isotune.distributed.launch import Process
from isotune.io.errors import Preempted, RunFault, UserError
from isotune.run.environment import versions
from isotune.run.preemption import stop_request
from isotune.run.run_dir import CHECKPOINTS, METRICS, RunDir
from isotune.training import lr_schedule_state
from isotune.training.callbacks.early_stopping import EarlyStop


class CheckpointingTrainer(Trainer):
    """Saves and resumes; what is trained is the business of the class that is derived from it.

    That class calls `set_up_checkpoints` when it is made, and sends the losses of a step through `gather_step`.

    Attributes:
        resumption: what this run went on from, None where it began at its first step.
        stall_seconds: how long training waited for each checkpoint.
        skipped_steps: updates that were left out, counted over all lives of the run.
    """

    recipe: RunRecipe
    process: Process
    args: TrainingArguments
    skipped_steps: int = 0
    early_stop: EarlyStop | None = None

    def set_up_checkpoints(self, run: RunDir, data_fingerprints: dict[str, str]) -> None:
        """Say where checkpoints go and which data they belong to. Nothing is written."""
        self.run = run
        self.data_fingerprints = data_fingerprints
        limit = self.recipe.training_arguments.get("save_total_limit")
        self.store = CheckpointStore(run.path / CHECKPOINTS, limit, run.lease)
        self.resumption: Resumption | None = None
        self.stall_seconds: list[float] = []
        self._writer: CheckpointWriter | None = None
        self._stop_agreed = self._write_failed = False
        self._ended_step = 0  # the last step whose end was seen, by this life or the one before
        self._epoch_end_done = self._evaluation_due = self._catching_up = False

    # ---- the whole of training ----

    def train(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        """Train from the first step, or from the checkpoint that the recipe's `resume` leads to.

        Raises:
            Preempted: a signal came, and a checkpoint is written.
            UserError, RunFault: see `find_resumption` and `CheckpointWriter`.
        """
        self.resumption = find_resumption(self.store, self.recipe, self.data_fingerprints, self.process)
        if self.resumption is not None and self.run.status is not None:
            self.run.status.step = self.resumption.step
        self._writer = CheckpointWriter(self.store, self._published)
        try:
            done = super().train(resume_from_checkpoint=self.resumption and str(self.resumption.folder))
            self._writer.wait()
        except (UserError, RunFault):
            # every rank comes here together, and a checkpoint that is nearly written is worth waiting for
            with contextlib.suppress(UserError, RunFault):
                self._writer.wait()
            raise
        return done

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As the stock one, which then is not asked to load anything: our state goes in at its end."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.resumption is not None:
            self._restore(self.resumption)
        return prepared

    def _init_training_state(  # type: ignore[override]
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """As the stock one, but an epoch whose end was not reached is entered again, though no step of it is left.

        Returns:
            the epoch to go on in, and its steps that are done.
        """
        found = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        if self.resumption is None:
            return found
        self.state.compute_steps(self.args, max_steps)  # how often to save or log may have been changed
        step = self._ended_step = self.resumption.step
        if self.early_stop is not None:
            self.early_stop.early_stopping_patience_counter = self.resumption.state["evaluations_without_better"]
            if self.early_stop.has_stopped and self.resumption.state["epoch_end_done"]:
                return num_train_epochs, 0
        if self.resumption.state["epoch_end_done"]:
            return -(-step // num_update_steps_per_epoch), 0
        epoch = (step - 1) // num_update_steps_per_epoch
        return epoch, step - epoch * num_update_steps_per_epoch

    def _run_epoch(self, *, train_dataloader: Any, ignore_keys_for_eval: Any, trial: Any, **rest: Any) -> None:  # type: ignore[override]
        """As the stock one; where the run went on, first what its last life had no time for."""
        if self.resumption is not None and self.resumption.state["evaluation_due"]:
            self.resumption.state["evaluation_due"] = False
            self._catching_up = True
            self._determine_best_metric(self._evaluate(trial, ignore_keys_for_eval), trial)
            self._catching_up = False
        if self.early_stop is not None and self.early_stop.has_stopped:
            self.control.should_training_stop = True
        # only the end of its last epoch is left
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            train_dataloader = train_dataloader.skipping(len(train_dataloader))
        super()._run_epoch(
            train_dataloader=train_dataloader, ignore_keys_for_eval=ignore_keys_for_eval, trial=trial, **rest
        )

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Not from the stock format; see `_restore`."""

    def _load_rng_state(self, *_: Any) -> None:  # type: ignore[override]
        """Randomness is counted, not carried."""

    # ---- at the end of each step ----

    def gather_step(self, losses: dict[int, torch.Tensor], count: int) -> list[float]:
        """`gather_by_number`, which carries along what every rank must know: that one was told to stop, or failed."""
        device = self.args.device
        notices = (stop_request.by is not None, self._writer is not None and self._writer.has_failed)
        own = {count + i: torch.tensor(float(notice), device=device) for i, notice in enumerate(notices)}
        table = gather_by_number({**losses, **own}, count + len(notices), device)
        self._stop_agreed, self._write_failed = (value > 0 for value in table[count:])
        return table[:count]

    def _maybe_log_save_evaluate(self, *arguments: Any, **more: Any) -> None:
        """As the stock one; then tell of a checkpoint that could not be written, and stop if so agreed."""
        self._epoch_end_done = self.state.global_step == self._ended_step  # Trainer comes a second time then
        self._ended_step = self.state.global_step
        stop = self._stop_agreed and not self._epoch_end_done
        self._evaluation_due = stop and self.control.should_evaluate
        if stop:
            self.control.should_evaluate, self.control.should_save = False, True
        super()._maybe_log_save_evaluate(*arguments, **more)
        assert self._writer is not None
        if self._write_failed or stop:
            self._writer.wait()
        if stop:
            folder = self.store.path / name_of(self.state.global_step)
            raise Preempted(f"stopped after step {self.state.global_step}: the same command goes on from {folder}")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the stock one; the best so far is saved whenever it comes."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and not self._catching_up and self.args.save_strategy != "no":
            self.control.should_save = True
        return is_best

    # ---- writing ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy the state to host memory, and leave the rest to a thread."""
        assert self._writer is not None
        started = time.perf_counter()
        self._writer.wait()
        self._writer.start(self._snapshot())
        self.stall_seconds.append(time.perf_counter() - started)

    def _snapshot(self) -> Snapshot:
        state = self.state
        if state.best_global_step:
            state.best_model_checkpoint = str(self.store.path / name_of(state.best_global_step))
        engine = self._engine_state()
        manifest = Manifest(
            step=state.global_step,
            world_size=self.process.world_size,
            engine=type(self.model_wrapped).__name__,
            recipe_fingerprint=self.recipe.fingerprint(),
            recipe=self.recipe.result_values(),
            data_fingerprints=self.data_fingerprints,
            versions=versions(),
            best_step=state.best_global_step,
            best_metric=state.best_metric,
        )
        record = {
            "step": state.global_step,
            "epoch_end_done": self._epoch_end_done,
            "evaluation_due": self._evaluation_due,
            "skipped_steps": self.skipped_steps,
            "evaluations_without_better": self.early_stop.early_stopping_patience_counter if self.early_stop else 0,
            "optimizer": engine.optimizer_state().as_dict(),
            **lr_schedule_state.capture(self),
        }
        texts = {
            STATE: json.dumps(record, indent=1) + "\n",
            TRAINER_STATE: json.dumps(dataclasses.asdict(state), indent=1, sort_keys=True) + "\n",
            METRICS: (self.run.path / METRICS).read_text("utf-8") if self.process.is_main else "",
        }
        tensors = {**engine.model(to_read=False), **engine.optimizer(to_read=False)}
        return Snapshot(host_copy(tensors), texts, manifest)

    def _published(self, folder: Path, manifest: Manifest) -> None:
        if self.run.status is not None:
            self.run.status.reached(manifest.step)

    def _engine_state(self) -> EngineState:
        wrapped: Any = self.model_wrapped
        optimizer = wrapped.optimizer if self.is_deepspeed_enabled else getattr(self.optimizer, "optimizer", None)
        model: Any = self.accelerator.unwrap_model(wrapped)
        reshard(model)  # an evaluation may have left parameters whole that the optimizer knows in shares
        return state_of(model, optimizer)

    # ---- reading ----

    def _restore(self, resumption: Resumption) -> None:
        """Put a checkpoint's state into the prepared engine, however that splits it."""
        engine = self._engine_state()
        engine.make_optimizer_state(OptimizerState(**resumption.state["optimizer"]))
        self._read(resumption.folder, engine, with_optimizer=True)
        lr_schedule_state.restore(self, resumption.state)
        self.skipped_steps = resumption.state["skipped_steps"]
        self.args.eval_on_start = False

    @torch.no_grad()
    def _read(self, folder: Path, engine: EngineState, *, with_optimizer: bool) -> None:
        tensors = engine.model(to_read=True)
        if with_optimizer:
            tensors |= engine.optimizer(to_read=True)
        try:
            read_tensors(folder / TENSORS, tensors)
        except RuntimeError as error:
            raise RunFault(f"the checkpoint does not fit what was built from its own recipe: {error}") from error
        engine.after_reading()

    def _finalize_training(self, *arguments: Any) -> Any:  # type: ignore[override]
        """As the stock one, once everything is on the disk."""
        assert self._writer is not None
        self._writer.wait()
        return super()._finalize_training(*arguments)

    def _load_best_model(self) -> None:
        """Take the weights of the best evaluation into the model that is about to be saved."""
        assert self.state.best_model_checkpoint is not None
        folder = Path(self.state.best_model_checkpoint)
        self._read(folder, self._engine_state(), with_optimizer=False)
        if self.process.is_main:
            print(f"best        step {self.state.best_global_step}: {self.state.best_metric:.6g}, from {folder}")
