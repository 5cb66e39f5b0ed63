"""What a run writes of each update and each evaluation: metrics.jsonl, the progress bar, and both together in words."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isotune.run.metrics_file import MetricsFile, peak_memory_bytes
from isotune.run.run_lease import RunLease
from isotune.training.callbacks.epoch_averages import EpochAverages
from isotune.training.callbacks.progress import ProgressBar
from isotune.training.tasks.task import Task
from isotune.training.update import OptimizerUpdate, UpdateResult

LIBRARY_METRICS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class MetricsRecorder:
    """Writes a line an update and a line an evaluation.

    Args:
        task: names the targets, and says what a line has beside the loss.
        progress: the bar that shows each update, or None.
        averages: means of training between two evaluations, or None.
    """

    def __init__(self, task: Task, progress: ProgressBar | None = None, averages: EpochAverages | None = None) -> None:
        self.task, self.progress, self.averages = task, progress, averages
        self.file: MetricsFile | None = None

    def open(self, path: Path, lease: RunLease) -> None:
        """Append to `path` from now on; the main process calls it when training begins."""
        self.file = MetricsFile(path, lease)

    def go_on(self, lines: str) -> None:
        """Take up the averages where an earlier attempt left them; `lines` of metrics.jsonl so far."""
        if self.averages is not None:
            self.averages = EpochAverages(lines)

    def update(
        self, result: UpdateResult, state: TrainerState, learning_rate: float, device: torch.device, skipped: int | None
    ) -> None:
        """Write what one update found; `skipped` updates so far, None where none can be."""
        step, seconds = result.step, time.perf_counter() - result.started_at
        metrics = self.task.train_metrics(step, result.count)
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": result.loss,
            **metrics,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            self.task.target: step.supervised_tokens,
            "input_tokens": step.input_tokens,
            "documents": step.documents,
            "step_seconds": seconds,
            "tokens_per_second": step.input_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        if skipped is not None:
            line["skipped_steps"] = skipped
        if self.file is not None:
            self.file.write(line)
        if self.averages is not None:
            self.averages.add(line)
        if self.progress is not None:
            rate = {f"{self.task.target}_per_s": step.supervised_tokens / seconds}
            self.progress.show({"loss": result.loss, **metrics}, rate, skipped or 0)

    def evaluation(self, metrics: dict[str, float], state: TrainerState) -> None:
        """Write what an evaluation found; Trainer's own figures of its speed go to its trackers only."""
        own = {name: value for name, value in metrics.items() if not name.endswith(LIBRARY_METRICS) and name != "epoch"}
        if self.file is not None:
            self.file.write({"step": state.global_step, "epoch": state.epoch, **own})

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self.file is not None:
            self.file.close()


class RecordUpdates(TrainerCallback):
    """Tells the recorder of each update before anything else is said about it, and of each evaluation."""

    def __init__(self, update: OptimizerUpdate, recorder: MetricsRecorder) -> None:
        self.update, self.recorder = update, recorder
        self._learning_rate = 0.0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate that the update used, before the schedule moves on."""
        self._learning_rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the update's line."""
        result, nonfinite = self.update.result, self.update.nonfinite
        assert result is not None
        nonfinite.count_overflow(result, self.update.sync.accelerator)
        skipped = nonfinite.skipped_steps if args.fp16 or nonfinite.skipped_steps else None
        self.recorder.update(result, state, self._learning_rate, args.device, skipped)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the evaluation's line."""
        self.recorder.evaluation(kwargs["metrics"], state)
