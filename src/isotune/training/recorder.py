"""What a run writes of each update and each evaluation: metrics.jsonl, the progress bar, means of training."""

import json
import math
import sys
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from isotune.run.metrics_file import MetricsFile, with_nulls
from isotune.run.run_lease import RunLease
from isotune.training.failures.out_of_memory import OutOfMemoryPolicy
from isotune.training.label_kinds import KINDS
from isotune.training.tasks import Task
from isotune.training.update import OptimizerUpdate

SHARES = tuple(kind.share for kind in KINDS.values() if kind.share)  # of a step's documents that are right
TRAINING = ("loss", *SHARES)
# what a line of several steps has of all of them: sums, and means of the steps' values; the rest is the last step's
SUMMED = ("supervised_tokens", "input_tokens", "documents", "step_seconds")
AVERAGED = ("loss", "router_loss")
SHOWN = ("accuracy", "f1_micro", "exact_match", "pearson", "spearman")  # of an evaluation
BAR_COLUMNS = 8  # of a terminal's line, at least
LIBRARY_METRICS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class ProgressBar(TrainerCallback):
    """A bar over optimizer updates on the main process's stderr; evaluation results go above it as lines."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar where the run begins or goes on."""
        if not self.quiet and state.is_world_process_zero:
            done, total = state.global_step, state.max_steps
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, file=sys.stderr)

    def show(self, figures: dict[str, float], speed: dict[str, float], skipped: int) -> None:
        """One update further; `figures` are its loss and the like, `speed` rates, by their names."""
        if self.bar is None:
            return
        facts = {name: f"{value:.4f}" for name, value in figures.items()}
        if skipped:
            facts["skipped_steps"] = str(skipped)
        facts |= {name: f"{rate:.0f}" for name, rate in speed.items()}
        self._set_fields(self.bar, facts)
        self.bar.update(1)

    @staticmethod
    def _set_fields(bar: tqdm, fields: dict[str, str]) -> None:
        """Leave out fields, the last ones first, until the line has room: tqdm would cut it off within a number."""
        names = list(fields)
        while True:
            bar.set_postfix({name: fields[name] for name in names}, refresh=False)
            columns = bar.format_dict["ncols"]  # None where nothing limits a line
            needed = len(bar.format_meter(**{**bar.format_dict, "ncols": 0})) + BAR_COLUMNS  # 0: without the bar itself
            if len(names) < 2 or columns is None or needed <= columns:
                return
            names.pop()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the metrics of an evaluation."""
        metrics = kwargs["metrics"]
        if state.is_world_process_zero:
            line = f"step {state.global_step}: eval_loss {metrics['eval_loss']:.4f}"
            if "eval_perplexity" in metrics:
                line += f", perplexity {metrics['eval_perplexity']:.2f}"
            for name in SHOWN:
                if f"eval_{name}" in metrics:
                    line += f", {name} {metrics[f'eval_{name}']:.4f}"
            training = [f"{name} {metrics[f'train_{name}']:.4f}" for name in TRAINING if f"train_{name}" in metrics]
            if training:
                line += f" (training: {', '.join(training)})"
            tqdm.write(line, file=sys.stderr)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class EpochAverages:
    """Exact means over the documents of the steps since the last evaluation, so that its line compares the two.

    A run that goes on has them from `state`, which a checkpoint of an earlier version lacks; then from `lines`,
    metrics.jsonl so far, which has every step of such a run.
    """

    def __init__(self, lines: str = "", state: Mapping[str, Any] | None = None) -> None:
        self._share: str | None = None  # what the lines call the share of right documents, where they have one
        self._documents, self._loss, self._right = 0, Fraction(), 0  # of steps with a finite loss
        if state is not None:
            self._share, self._documents, self._right = state["share"], state["documents"], state["right"]
            self._loss = Fraction(state["loss"])
            return
        for line in map(json.loads, lines.splitlines()):
            if "eval_loss" in line:
                self.take()
            elif "loss" in line:
                self.add(line)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "share": self._share, "documents": self._documents, "right": self._right, "loss": str(self._loss),
        }  # fmt: skip

    def add(self, line: Mapping[str, Any]) -> None:
        """A step's line of metrics.jsonl: its documents, loss and share of right ones."""
        self._share = next((name for name in SHARES if name in line), None)
        if line["loss"] is None or not math.isfinite(line["loss"]):
            return
        self._documents += line["documents"]
        self._loss += Fraction(line["documents"] * line["loss"])
        self._right += 0 if self._share is None else _right(line, self._share)

    def take(self) -> dict[str, float]:
        """train_loss and the share of right documents, of the steps since the last call that have a finite loss."""
        documents, loss, right = self._documents, self._loss, self._right
        self._documents, self._loss, self._right = 0, Fraction(), 0
        if not documents:
            return {}
        means = {"train_loss": float(loss) / documents}
        if self._share is not None:
            means[f"train_{self._share}"] = right / documents
        return means


def _right(line: Mapping[str, Any], share: str) -> int:
    """How many documents of a step were right: a whole number again, of which the share is the rounded quotient."""
    return round(line[share] * line["documents"])


class StepSums:
    """The steps since the last line of metrics.jsonl, and the line that they make together.

    Sums are exact, so the line is the same wherever the run was stopped between these steps and went on from `state`.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"steps": 0, "last": {}, "sums": {}, "finite": {}}
        self.steps: int = state["steps"]
        self._last: dict[str, Any] = dict(state["last"])
        self._sums = {key: Fraction(total) for key, total in state["sums"].items()}
        self._finite: dict[str, int] = dict(state["finite"])  # steps that have a finite number under the key

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        sums = {key: str(total) for key, total in self._sums.items()}
        return {"steps": self.steps, "last": with_nulls(self._last), "sums": sums, "finite": self._finite}

    def add(self, line: Mapping[str, Any]) -> None:
        """The line of one step."""
        self.steps, self._last = self.steps + 1, dict(line)
        for key in (*SUMMED, *AVERAGED, *SHARES):
            value = line.get(key)
            if value is None or not math.isfinite(value):
                continue
            self._sums[key] = self._sums.get(key, Fraction()) + Fraction(_right(line, key) if key in SHARES else value)
            self._finite[key] = self._finite.get(key, 0) + 1

    def take(self) -> dict[str, Any]:
        """The line of all steps since the last call: that of one step is its own."""
        steps, line, sums, finite = self.steps, self._last, self._sums, self._finite
        self.steps, self._last, self._sums, self._finite = 0, {}, {}, {}
        if steps == 1:
            return line
        for key in [key for key in line if key in (*SUMMED, *AVERAGED, *SHARES)]:
            if key in SUMMED:
                line[key] = float(sums[key]) if key == "step_seconds" else int(sums[key])
            elif key in SHARES:
                line[key] = float(sums[key] / int(sums["documents"]))
            else:
                line[key] = float(sums[key] / finite[key]) if key in finite else math.nan
        return {**line, "tokens_per_second": line["input_tokens"] / line["step_seconds"], "steps": steps}


class MetricsRecorder(TrainerCallback):
    """Writes a line every `logging_steps` updates and one an evaluation, and shows each update on the bar.

    `task` names the targets, and says what a line has beside the loss.
    """

    def __init__(self, task: Task, progress: ProgressBar | None = None, averages: EpochAverages | None = None) -> None:
        self.task, self.progress, self.averages = task, progress, averages
        self.update: OptimizerUpdate | None = None
        self.memory: OutOfMemoryPolicy | None = None
        self.file: MetricsFile | None = None
        self.sums = StepSums()
        self._learning_rate = 0.0

    def watch(self, update: OptimizerUpdate, memory: OutOfMemoryPolicy) -> None:
        """Record what `update` finds, and what `memory` repeats; the trainer says so when it has made them."""
        self.update, self.memory = update, memory

    def open(self, path: Path, lease: RunLease) -> None:
        """Append to `path` from now on; the main process calls it when training begins."""
        self.file = MetricsFile(path, lease)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sums of the steps that no line has yet, and the averages."""
        return {"line": self.sums.state(), "averages": self.averages and self.averages.state()}

    def go_on(self, lines: str, state: Mapping[str, Any] | None) -> None:
        """Go on where an earlier attempt ended: `lines` of metrics.jsonl so far, `state` where its version kept it."""
        self.sums = StepSums(state and state["line"])
        if self.averages is not None:
            self.averages = EpochAverages(lines, state and state["averages"])

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self.file is not None:
            self.file.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget the peak of memory of what came before: loading and quantizing."""
        self.forget_peak(args.device)

    def forget_peak(self, device: torch.device) -> None:
        """Peaks count from here on; also called after the self-tests and what tries memory, which train nothing."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate that the update used, before the schedule moves on."""
        self._learning_rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the update's line, or add it to those of the updates since the last one."""
        assert self.update is not None and self.update.result is not None and self.memory is not None
        result, nonfinite = self.update.result, self.update.nonfinite
        nonfinite.count_overflow(result, self.update.sync.accelerator)
        step, seconds = result.step, time.perf_counter() - result.started_at
        metrics = self.task.train_metrics(step, result.count)
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": result.loss,
            **metrics,
            "grad_norm": result.grad_norm,
            "learning_rate": self._learning_rate,
            self.task.target: step.supervised_tokens,
            "input_tokens": step.input_tokens,
            "documents": step.documents,
            "step_seconds": seconds,
            "tokens_per_second": step.input_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(args.device),
        }
        if args.device.type == "cuda":
            line["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(args.device)
        if args.fp16 or nonfinite.skipped_steps:
            line["skipped_steps"] = nonfinite.skipped_steps
        if self.memory.retries:
            line["out_of_memory_retries"] = self.memory.retries
        self.sums.add(line)
        if self.averages is not None:
            self.averages.add(line)
        # a line ends where the library reports to the trackers, and at the last step of all
        is_last = state.global_step >= state.max_steps
        if control.should_log or is_last or args.logging_strategy != IntervalStrategy.STEPS:
            self.end_line()
        if self.progress is not None:
            rate = {f"{self.task.target}_per_s": step.supervised_tokens / seconds}
            self.progress.show({"loss": result.loss, **metrics}, rate, nonfinite.skipped_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the line of the last steps, where training ends early."""
        self.end_line()

    def end_line(self) -> None:
        """Write the line of the steps since the last one, where there are any."""
        if self.sums.steps:
            line = self.sums.take()
            if self.file is not None:
                self.file.write(line)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the evaluation's line; Trainer's own figures of its speed go to its trackers only."""
        found: dict[str, Any] = kwargs["metrics"]
        own = {name: value for name, value in found.items() if not name.endswith(LIBRARY_METRICS) and name != "epoch"}
        if self.file is not None:
            self.file.write({"step": state.global_step, "epoch": state.epoch, **own})


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the CUDA device since training began, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset  # type: ignore[attr-defined]  (of Windows only)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
