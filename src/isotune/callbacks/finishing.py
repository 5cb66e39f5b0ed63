"""What a script's run leaves when it has trained: the verified model, and loss curve, model card and report."""

import contextlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from isotune.checkpoint.engine_state import plain_model
from isotune.checkpoint.final_model import save_and_verify
from isotune.compat.deepspeed import load_whole_models
from isotune.drop_in.sessions import TrainingSession
from isotune.io.errors import UserError
from isotune.io.run_files import or_empty, read_status
from isotune.report.html_report import REPORT, write_report
from isotune.report.loss_curve import PICTURE, draw_loss_curve
from isotune.report.model_card import CARD, write_model_card
from isotune.run.finishing import FinishingStep, finish, weights_of
from isotune.run.preemption import MODEL_STEP
from isotune.run.run_dir import LeasedDir


class RunRecording(TrainingSession):
    """Records a training, and lets each FinishingCallback do its part."""


class FinishingCallback(TrainingSession, ABC):
    """Does its part at the end of a training that a RunFolder records, and says before it where it could not."""

    order = 0  # of those that finish a run

    def session(self, trainer: Any) -> contextlib.AbstractContextManager[None]:
        """UserError without a RunFolder: nobody would call `finish`."""
        if not any(isinstance(own, RunRecording) for own in trainer.callback_handler.callbacks):
            raise UserError(f"{type(self).__name__} finishes what RunFolder records: add RunFolder() to the callbacks")
        return super().session(trainer)

    def check(self, trainer: Any, run: LeasedDir) -> None:
        """UserError where it could not do its part; before anything is trained, on the main process."""

    @abstractmethod
    def finish(self, trainer: Any, run: LeasedDir) -> None:
        """Do it; every rank calls it."""


class FinalModel(FinishingCallback):
    """Saves FOLDER/model with its tokenizer, reopened and compared with memory, bit for bit, before it has its name.

    A sharded model is gathered. RunFault where the files differ.
    """

    order = 1

    def check(self, trainer: Any, run: LeasedDir) -> None:
        """A folder of that name that no run made may be what the script trains."""
        if _tokenizer_of(trainer) is None:
            raise UserError("FinalModel saves a tokenizer beside the model: give the trainer its processing_class")
        made = or_empty(read_status, run.path).get("made", {})
        if run.model.exists() and not any(name.startswith(f"{run.model.name}/") for name in made):
            raise UserError(f"FinalModel: '{run.model}' is there, and not of an earlier run: choose another folder")

    def finish(self, trainer: Any, run: LeasedDir) -> None:
        """Save it; every rank calls it."""
        accelerator = trainer.accelerator
        accelerator.wait_for_everyone()
        run.lease.check()  # a later attempt's model is not replaced
        model: Any = plain_model(accelerator.unwrap_model(trainer.model_wrapped), keep=accelerator.process_index == 0)
        if trainer.is_deepspeed_enabled:
            load_whole_models()  # to be reopened
        if model is not None:
            print(f"model       {run.model}: {save_and_verify(model, _tokenizer_of(trainer), run.model)}", flush=True)
            run.status.has_done(MODEL_STEP, weights_of(run))
        accelerator.wait_for_everyone()


class Report(FinishingCallback):
    """Writes loss_curve.png and report.html, and the model card where FinalModel has saved a model.

    What cannot be written is said in a line, and costs the script nothing else.
    """

    order = 2

    def finish(self, trainer: Any, run: LeasedDir) -> None:
        """Write them; the main process does."""
        if trainer.args.process_index:
            return
        steps = [FinishingStep("loss_curve", lambda: _say("loss curve", draw_loss_curve(run.path)), run.path / PICTURE)]
        if MODEL_STEP in run.status.finishing:
            card = FinishingStep("model_card", lambda: _say("model card", write_model_card(run.path)), run.model / CARD)
            steps.append(card)
        steps.append(FinishingStep("report", lambda: _say("report", write_report([run.path])), run.path / REPORT))
        for step in steps:
            try:
                finish(run, [step])
            except UserError as error:
                print(f"note        {step.name}: {error}", flush=True)


def _tokenizer_of(trainer: Any) -> Any:
    """What the library saves beside a model."""
    return trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)


def _say(what: str, file: Path) -> None:
    print(f"{what:<12}{file}", flush=True)
