"""Early stopping by transformers' own callback, which counts on where a resumed run was and says why it stopped."""

from collections.abc import Callable
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from isotune.config import RunRecipe


class EarlyStop(EarlyStoppingCallback):
    """transformers' callback, whose verdict outlives a life of the run.

    Args:
        recipe: whose early_stopping_patience is given.
        say: prints a line on the main process.
    """

    def __init__(self, recipe: RunRecipe, say: Callable[[str], None]) -> None:
        assert recipe.early_stopping_patience is not None
        super().__init__(recipe.early_stopping_patience, recipe.early_stopping_threshold)
        self.keeps_best = bool(recipe.training_arguments.get("load_best_model_at_end"))
        self.say = say

    @property
    def has_stopped(self) -> bool:
        """Whether training has ended, in this life of the run or in one before."""
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
            self.say(
                f"stopped     early after step {state.global_step}: {args.metric_for_best_model} has not been better "
                f"than {state.best_metric:.6g} for {times} evaluation{'s' if times > 1 else ''}; {final}"
            )
