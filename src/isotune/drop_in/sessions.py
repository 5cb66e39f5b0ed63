"""Callbacks that hold something for the whole of a training, such as a run's folder, and learn how it ended."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from isotune.io.errors import UserError


class TrainingSession(TrainerCallback):
    """A callback whose `session` is entered before a drop-in trainer trains, and left when it has, or by its error."""

    def __init__(self) -> None:
        self.is_held = False  # a trainer trains, and has entered the session

    def session(self, trainer: Any) -> contextlib.AbstractContextManager[None]:
        """Hold it around the training of this trainer; every rank enters it."""
        return contextlib.nullcontext()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """UserError under the library's own trainer, which knows of no session."""
        if not self.is_held:
            raise UserError(f"{type(self).__name__} is a callback of isotune.Trainer and isotune.SFTTrainer")


@contextlib.contextmanager
def sessions_of(trainer: Any) -> Iterator[None]:
    """Hold the sessions of a trainer's callbacks, the first one outermost."""
    own = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TrainingSession)]
    with contextlib.ExitStack() as held:
        try:
            for callback in own:
                held.enter_context(callback.session(trainer))
                callback.is_held = True
            yield
        finally:
            for callback in own:
                callback.is_held = False
