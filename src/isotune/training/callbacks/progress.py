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
        """Print what an evaluation found."""
        found = kwargs["metrics"]
        if state.is_world_process_zero:
            line = f"step {state.global_step}: eval_loss {found['eval_loss']:.4f}"
            if "eval_perplexity" in found:
                line += f", perplexity {found['eval_perplexity']:.2f}"
            if "eval_accuracy" in found:
                line += f", accuracy {found['eval_accuracy']:.4f}"
            if "train_loss" in found:
                line += f" (training: loss {found['train_loss']:.4f}, accuracy {found['train_accuracy']:.4f})"
            self.say(line)

    def say(self, line: str) -> None:
        """A line above the bar, or a plain line where there is none."""
        tqdm.write(line, file=sys.stderr)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
