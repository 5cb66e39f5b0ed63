"""Early stopping by transformers' own callback, which counts on where a resumed run was and says why it stopped."""

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from isotune.config import RunRecipe
from isotune.training.callbacks.progress import write_line


class EarlyStop(EarlyStoppingCallback):
    """transformers' callback, whose count outlives an attempt of the run.

    Args:
        recipe: whose early_stopping_patience is given.
    """

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

    def on_evaluate(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **more: Any
    ) -> None:
        """As the stock one, and a line where it ends training."""
        super().on_evaluate(args, state, control, metrics, **more)
        if self.has_stopped and state.is_world_process_zero and state.global_step < state.max_steps:
            times = self.early_stopping_patience
            final = "the best model is kept" if self.keeps_best else "the model is kept as it is now"
            write_line(
                f"stopped     early after step {state.global_step}: {args.metric_for_best_model} has not been better "
                f"than {state.best_metric:.6g} for {times} evaluation{'s' if times > 1 else ''}; {final}"
            )
