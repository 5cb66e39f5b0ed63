"""The folder of a script's run: lease, recipe.yaml, environment.json, metrics.jsonl, status.json as of any run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from isotune.callbacks.finishing import FinishingCallback, RunRecording
from isotune.callbacks.record import data_counts, data_fingerprint, guarantees, recipe_text, script_name
from isotune.distributed.engines import read_back
from isotune.distributed.launch import Process
from isotune.distributed.ranks import call_on_main
from isotune.io.errors import UserError
from isotune.io.files import set_aside
from isotune.io.run_files import (
    ENVIRONMENT,
    RECIPE,
    SCRIPT,
    or_empty,
    read_environment,
    read_recipe_values,
    read_status,
)
from isotune.models.packed_attention import PACKED, last_kernel
from isotune.run import environment
from isotune.run.metrics_file import METRICS, read_line
from isotune.run.preemption import supervised
from isotune.run.run_dir import LeasedDir
from isotune.run.run_lease import slurm_ids
from isotune.training.recorder import MetricsRecorder


class RunFolder(RunRecording):
    """Records a training of `isotune.Trainer` or `isotune.SFTTrainer` in a folder that `isotune runs` lists.

    While it trains the folder has a lease, so no second process writes there, and status.json says whether it runs, has
    finished or failed, and why; a process that was killed is told from its lease. recipe.yaml has the arguments as they
    were given, environment.json what was in effect, metrics.jsonl a line an update and an evaluation. A training that
    goes on from a checkpoint keeps the lines up to its step; one from the start replaces the record of an earlier one.

    `folder` is by default the `output_dir` of the arguments. `dataset_name` and `eval_dataset_name` are for the record.
    UserError where the folder is in use, or holds a run of a recipe.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        dataset_name: str | None = None,
        eval_dataset_name: str | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.names = folder, {"dataset_name": dataset_name, "eval_dataset_name": eval_dataset_name}
        self.run: LeasedDir | None = None  # while a trainer trains
        self._trainer: Any = None
        self._recorder: MetricsRecorder | None = None

    @contextlib.contextmanager
    def session(self, trainer: Any) -> Iterator[None]:
        """Hold the lease, record what the training leaves, and do what finishes it."""
        args = trainer.args
        if trainer.hp_search_backend is not None:
            raise UserError("RunFolder is of one training, and a search has many: add it to the last one")
        run = self.run = LeasedDir(Path(self.folder or args.output_dir))
        process = Process(args.process_index, args.world_size, args.device)
        last = [own for own in trainer.callback_handler.callbacks if isinstance(own, FinishingCallback)]
        call_on_main(process, lambda: _check_folder(trainer, run, last))
        recorder = self._recorder = MetricsRecorder(trainer.plan.task)
        self._trainer = trainer
        trainer.remove_callback(self)  # and after the self-test, whose result is recorded
        for callback in (self, recorder):
            trainer.add_callback(callback)
        try:
            with supervised(run, process, catches_signals=False):
                run.status.made = or_empty(read_status, run.path).get("made", {})  # which a new model replaces
                yield
                run.status.step = trainer.state.global_step
                for callback in sorted(last, key=lambda own: own.order):
                    callback.finish(trainer, run)
        finally:
            recorder.close()
            trainer.remove_callback(recorder)
            self.run = self._trainer = self._recorder = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Nothing has been trained, and everything is prepared: write what is in effect."""
        super().on_train_begin(args, state, control)
        assert self._recorder is not None and self.run is not None
        trainer, plan = self._trainer, self._trainer.plan
        self._recorder.task = plan.task
        self._recorder.watch(trainer.update, trainer.memory)
        found = environment.in_effect(trainer, read_back(trainer))
        kernel = last_kernel(in_training=True)
        found["attention_kernel"] = kernel if plan.task.attention == PACKED else found["attention"]
        if args.process_index:
            return
        process = Process(args.process_index, args.world_size, args.device)
        record = {
            SCRIPT: script_name(),
            "versions": environment.versions(),
            "git_commit": environment.git_commit(),
            "command": environment.command(),
            **environment.devices(process),
            "slurm": slurm_ids(),
            "in_effect": found,
            "isolation": trainer.isolation,
            "data_fingerprints": {"train": data_fingerprint(plan.documents)},
            "data": {"train": data_counts(plan.documents)},
            "guarantees": guarantees(trainer),
        }
        self.run.status.steps, self.run.status.step = state.max_steps, state.global_step
        kept = _lines_up_to(self.run.path / METRICS, state.global_step)
        earlier = or_empty(read_status, self.run.path)
        if earlier and not state.global_step:
            ended = f"{earlier.get('status')} after step {earlier.get('step')}"
            print(
                f"note        {self.run.path} held the record of a run ({ended}), which this one replaces", flush=True
            )
        if not state.global_step and any(name.startswith(f"{self.run.model.name}/") for name in self.run.status.made):
            set_aside(self.run.model)  # of an earlier training; its new model removes it
        self.run.write_first_files(record, recipe_text(trainer, self.names), kept)
        self._recorder.open(self.run.path / METRICS, self.run.lease)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The step is in a checkpoint; a line ends there, as the library's checkpoints keep no half of one."""
        if self._recorder is not None:
            self._recorder.end_line()
        if self.run is not None and self.run.status is not None:
            self.run.status.reached(state.global_step)


def _check_folder(trainer: Any, run: LeasedDir, last: list[FinishingCallback]) -> None:
    """UserError where the folder is something else, or has what is not to be replaced; the main process calls it."""
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"RunFolder: '{run.path}' is a file")
    recorded = (run.path / RECIPE).exists() or (run.path / ENVIRONMENT).exists()
    is_script = any(SCRIPT in or_empty(read, run.path) for read in (read_recipe_values, read_environment))
    if recorded and not is_script:
        raise UserError(f"RunFolder: '{run.path}' holds a run of isotune, or its recipe: choose another folder")
    for callback in last:
        callback.check(trainer, run)


def _lines_up_to(file: Path, step: int) -> str | None:
    """The lines of metrics.jsonl that a checkpoint of this step has seen; None where a training begins."""
    if not step:
        return None
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return ""
    seen = [line for line in lines if (entry := read_line(line)) is not None and entry["step"] <= step]
    return b"".join(seen).decode("utf-8")
