"""Trainer's events: the checks before the first step, and early stopping."""

import os
import sys
from typing import Any

from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isotune.config import Recipe, RunRecipe
from isotune.config.effects import settings_without_effect
from isotune.config.task_types import SINGLE_LABEL
from isotune.data.sft.shown_example import ShownExample
from isotune.data.sources.hub import hub_record
from isotune.distributed.engines import check_engine, read_back
from isotune.distributed.precision import cost_of_emulation
from isotune.io.errors import RunFault
from isotune.models.isolation import check_isolation
from isotune.models.opening import compute_dtype
from isotune.models.packed_attention import PACKED, last_kernel
from isotune.run import environment
from isotune.run.metrics_file import METRICS
from isotune.run.run_lease import slurm_ids


class PreTrainChecks(TrainerCallback):
    """Between preparation and the first step: self-tests on the prepared model, what is in effect, the run's files."""

    def __init__(self, trainer: Any, data_counts: dict[str, dict[str, Any]]) -> None:
        self.trainer, self.data_counts = trainer, data_counts
        self.process, self.run = trainer.checkpointer.process, trainer.checkpointer.run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last moment at which nothing has been trained or written."""
        trainer, task = self.trainer, self.trainer.plan.task
        schedule = trainer.plan.schedule
        counts = state.max_steps, schedule.steps_per_epoch, len(schedule.rows)
        without_effect = settings_without_effect(self.run.recipe, *counts)
        engine = read_back(trainer)
        check_engine(engine, trainer, self.run.recipe, self.process)
        found = environment.in_effect(trainer, engine)
        if found["attention"] != task.attention:
            raise RunFault(f"attention is {found['attention']} after preparation, and {task.attention} was asked")
        if not found["trained_parameters"]:
            raise RunFault("no parameter of the prepared model is trained; nothing was done")
        isolation = check_isolation(
            trainer.model_wrapped,
            trainer.accelerator.unwrap_model(trainer.model_wrapped).config.get_text_config().vocab_size,
            args.device,
            compute_dtype(self.run.recipe),
            classifier=task.item == "documents",
            padded=task.pads,
            task_type=getattr(task, "task_type", SINGLE_LABEL),
        )
        trainer.try_costliest_microbatch()
        kernel = last_kernel(in_training=True)  # an evaluation drops no weights, and may run another
        found["attention_kernel"] = kernel if task.attention == PACKED else found["attention"]
        trainer.recorder.forget_peak(args.device)
        trainer.watchdog.progress("its first step")
        if not self.process.is_main:
            return
        record = {
            "versions": environment.versions(),
            "git_commit": environment.git_commit(),
            "command": environment.command(),
            **environment.devices(self.process),
            "slurm": slurm_ids(),
            "in_effect": found,
            "isolation": isolation,
            "data_fingerprints": trainer.checkpointer.data_fingerprints,
            "data": self.data_counts,
            "hub": hub_record(),
        }
        example = self._example()
        if example is not None:
            record["example"] = {"row": example.row, "segments": example.segments}
        resumption = trainer.checkpointer.resumption
        if self.run.status is not None:
            self.run.status.steps = state.max_steps
        self.run.begin(record, metrics=resumption and resumption.metrics)
        trainer.recorder.open(self.run.path / METRICS, self.run.lease)
        self._print(record, without_effect)
        if example is not None:
            print(example.lines(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ), flush=True)

    def _example(self) -> ShownExample | None:
        """A document of the first step, where conversations are learnt and `show_example` asks for one."""
        recipe, plan = self.run.recipe, self.trainer.plan
        if not isinstance(recipe, Recipe) or not recipe.show_example:
            return None
        document = int(plan.schedule.step(0).microbatches[0].documents[0])
        return ShownExample.of(plan.documents.documents, document, self.trainer.processing_class)

    def _print(self, record: dict[str, Any], without_effect: list[str]) -> None:
        found, plan, process = record["in_effect"], self.trainer.plan, self.process
        engine = found["engine"]
        if found["zero_stage"] is not None:
            engine += f", ZeRO-{found['zero_stage']}"
        if found["offload"]:
            engine += f", {' and '.join(found['offload'])} in host memory"
        share = found["trained_parameters"] / found["all_parameters"]
        first = plan.schedule.step(0)
        tokens = plan.task.target == "supervised_tokens"
        targets = f", {first.supervised_tokens} supervised tokens" if tokens else ""
        print(
            f"engine      {engine} on {process.world_size} x "
            f"{record['device_name'] or record['device']}, {record['threads_per_process']} threads each\n"
            f"each rank   {found['parameter_bytes_per_rank'] / 1e6:,.1f} MB of weights, "
            f"{found['optimized_numbers_per_rank']:,} numbers in {found['optimizer']}\n"
            f"precision   {found['precision']}, weights {found['weights_dtype']}, clipping {found['max_grad_norm']}\n"
            f"attention   {found['attention']} by {found['attention_kernel']}; leak {record['isolation']['leak']:.1g}\n"
            f"trained     {found['trained_parameters']:,} of {found['all_parameters']:,} parameters ({share:.2%}), "
            f"exact_gradients {str(found['exact_gradients']).lower()}\n"
            f"plan        {self.trainer.state.max_steps} steps of {plan.schedule.global_batch_size} {plan.task.item}; "
            f"the first: {len(first.microbatches)} microbatches, {first.documents} documents{targets}",
            flush=True,
        )
        for sentence in without_effect:
            print(f"no effect   {sentence}")
        for what, key in (("microbatches", "accumulation_dtype"), ("processes", "reduction_dtype")):
            if found[key] != "float32":
                print(f"note        gradients of {what} add up in {found[key]} under {engine}")
        if emulated := cost_of_emulation(self.run.recipe, process.device):
            print(f"note        {emulated}")
        if found["zero_stage"] == 0 and found["precision"] == "bf16":
            print("note        ZeRO-0 in bf16 keeps no weights in fp32, and loses small updates: use DDP or ZeRO-1")
        idle = process.world_size - len(first.microbatches)
        if idle > 0:
            print(f"note        {idle} of {process.world_size} processes have nothing to do: raise global_batch_size")
        cores = os.cpu_count() or 1
        if process.device.type == "cpu" and process.world_size == 1 and record["threads_per_process"] < cores:
            print(f"note        one thread of {cores} cores in use: set OMP_NUM_THREADS={cores} to use them all")


class EarlyStop(EarlyStoppingCallback):
    """transformers' callback, whose count outlives an attempt of the run; `recipe` has an early_stopping_patience."""

    def __init__(self, recipe: RunRecipe) -> None:
        assert recipe.early_stopping_patience is not None
        super().__init__(recipe.early_stopping_patience, recipe.early_stopping_threshold)
        self.keeps_best = bool(recipe.training_arguments.get("load_best_model_at_end"))

    @property
    def has_stopped(self) -> bool:
        """Whether training has ended, in this attempt of the run or in one before."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Nothing: the stock one warns where the final model is not the best, which the last line says too."""

    def on_evaluate(  # type: ignore[override]  (every event passes its facts by keyword)
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **more: Any
    ) -> None:
        """As the stock one, and a line where it ends training."""
        super().on_evaluate(args, state, control, metrics, **more)
        if self.has_stopped and state.is_world_process_zero and state.global_step < state.max_steps:
            times = self.early_stopping_patience
            final = "the best model is kept" if self.keeps_best else "the model is kept as it is now"
            line = (
                f"stopped     early after step {state.global_step}: {args.metric_for_best_model} has not been better "
                f"than {state.best_metric:.6g} for {times} evaluation{'s' if times > 1 else ''}; {final}"
            )
            tqdm.write(line, file=sys.stderr)
