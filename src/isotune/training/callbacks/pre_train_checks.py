"""Between preparation and the first step: look at what is really there, refuse what is wrong, and write it down."""

import os
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isotune.distributed.engines import check_engine, read_back
from isotune.io.errors import RunFault
from isotune.models.isolation import check_isolation
from isotune.models.opening import compute_dtype
from isotune.run import environment
from isotune.run.attempt import slurm_ids
from isotune.run.run_dir import METRICS
from isotune.training.checkpointer import Checkpointer

if TYPE_CHECKING:
    from isotune.training.trainer import PlannedTraining


class PreTrainChecks(TrainerCallback):
    """Runs the self-tests on the prepared model, prints what is in effect and begins the run directory.

    Args:
        trainer: whose prepared objects are looked at.
        checkpointer: of the run, whose directory is still untouched.
        data_counts: what preparation did to the data, counted, by role.
    """

    def __init__(
        self, trainer: "PlannedTraining", checkpointer: Checkpointer, data_counts: dict[str, dict[str, Any]]
    ) -> None:
        self.trainer: Any = trainer
        self.checkpointer, self.process, self.run = checkpointer, checkpointer.process, checkpointer.run
        self.data_counts = data_counts

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last moment at which nothing has been trained or written."""
        trainer, task = self.trainer, self.trainer.plan.task
        engine = read_back(trainer)
        check_engine(engine, trainer, self.run.recipe, self.process)
        found = environment.in_effect(trainer, engine)
        self._compare(found)
        config = trainer.accelerator.unwrap_model(trainer.model_wrapped).config
        isolation = check_isolation(
            trainer.model_wrapped,
            config.vocab_size,
            args.device,
            compute_dtype(self.run.recipe),
            classifier=task.item == "documents",
        )
        trainer.watchdog.start()
        if not self.process.is_main:
            return
        record = {
            "versions": environment.versions(),
            "git_commit": environment.git_commit(),
            "command": environment.command([name for name, key in self.run.recipe.keys().items() if key.secret]),
            **environment.devices(self.process),
            "slurm": slurm_ids(),
            "in_effect": found,
            "isolation": isolation.as_dict(),
            "data_fingerprints": self.checkpointer.data_fingerprints,
            "data": self.data_counts,
        }
        resumption = self.checkpointer.resumption
        self.run.begin(record, metrics=resumption and resumption.metrics)
        trainer.recorder.open(self.run.path / METRICS, self.run.lease)
        self._print(record)

    def _compare(self, found: dict[str, Any]) -> None:
        wanted = self.trainer.plan.task.attention
        if found["attention"] != wanted:
            raise RunFault(f"attention is {found['attention']} after preparation, and {wanted} was asked")
        if not found["trained_parameters"]:
            raise RunFault("no parameter of the prepared model is trained; nothing was done")

    def _print(self, record: dict[str, Any]) -> None:
        found, plan, process = record["in_effect"], self.trainer.plan, self.process
        share = found["trained_parameters"] / found["all_parameters"]
        first = plan.schedule.step(0)
        tokens = plan.task.target == "supervised_tokens"
        targets = f", {first.supervised_tokens} supervised tokens" if tokens else ""
        print(
            f"engine      {_engine_in_words(found)} on {process.world_size} x "
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
        idle = process.world_size - len(first.microbatches)
        if idle > 0:
            print(f"note        {idle} of {process.world_size} processes have nothing to do: raise global_batch_size")
        cores = os.cpu_count() or 1
        if process.device.type == "cpu" and process.world_size == 1 and record["threads_per_process"] < cores:
            print(f"note        one thread of {cores} cores in use: set OMP_NUM_THREADS={cores} to use them all")


def _engine_in_words(found: dict[str, Any]) -> str:
    words = [found["engine"]]
    if found["zero_stage"] is not None:
        words.append(f"ZeRO-{found['zero_stage']}")
    if found["offload"]:
        words.append(f"{' and '.join(found['offload'])} in host memory")
    return ", ".join(words)
