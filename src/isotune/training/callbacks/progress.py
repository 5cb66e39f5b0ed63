"""The progress bar of a run: loss, speed, and the time that is left."""

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """A bar over optimizer updates on the main process's stderr; evaluation results go above it as lines."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar where the run begins or goes on."""
        if not self.quiet and state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def show(self, figures: dict[str, float], speed: dict[str, float], skipped: int) -> None:
        """One update further; `figures` are its loss and the like, `speed` rates, by their names."""
        if self.bar is None:
            return
        facts = {name: f"{value:.4f}" for name, value in figures.items()}
        facts |= {name: f"{rate:.0f}" for name, rate in speed.items()}
        if skipped:
            facts["skipped_steps"] = str(skipped)
        self.bar.set_postfix(facts, refresh=False)
        self.bar.update(1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the metrics of an evaluation."""
        metrics = kwargs["metrics"]
        if state.is_world_process_zero:
            line = f"step {state.global_step}: eval_loss {metrics['eval_loss']:.4f}"
            if "eval_perplexity" in metrics:
                line += f", perplexity {metrics['eval_perplexity']:.2f}"
            if "eval_accuracy" in metrics:
                line += f", accuracy {metrics['eval_accuracy']:.4f}"
            if "train_loss" in metrics:
                line += f" (training: loss {metrics['train_loss']:.4f}, accuracy {metrics['train_accuracy']:.4f})"
            write_line(line)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def write_line(line: str) -> None:
    """A line on stderr, above the bar where there is one."""
    tqdm.write(line, file=sys.stderr)
