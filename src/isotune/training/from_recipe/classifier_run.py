"""The frame of every classification script: what stands before its data, and what comes after.

start = start_classifier(recipe)        processes, run folder, tokenizer
data = ...                              the script's own: documents with a class each
trained = train_classifier(start, data) model, trainer, steps, RUN/model
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from isotune.checkpoint.final_model import FinalModelReport
from isotune.checkpoint.resume import open_run
from isotune.config import ClassificationRecipe
from isotune.data.documents import RunData
from isotune.distributed.launch import Process, start_process
from isotune.models.opening import load_config, load_tokenizer
from isotune.run.preemption import supervised
from isotune.run.run_dir import RunDir
from isotune.training.from_recipe import classification
from isotune.training.trainer import PlannedTraining


@dataclass(frozen=True)
class Start:
    """A classification run before its data: its processes stand, its folder is free, nothing is written yet."""

    recipe: ClassificationRecipe
    process: Process
    run: RunDir
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trained:
    """A finished run: the trainer with the final model, and what was saved (None but on the main process)."""

    run: RunDir
    trainer: PlannedTraining
    saved: FinalModelReport | None


def start_classifier(recipe: ClassificationRecipe) -> Start:
    """Join this launch's processes, look at the run folder and load what reads texts.

    Raises:
        UserError: the launch, the folder, the model's configuration or its tokenizer is not what the recipe says.
        AlreadyDone: the run is finished.
    """
    process = start_process(recipe)
    run = open_run(recipe)
    return Start(recipe, process, run, load_config(recipe), load_tokenizer(recipe, needed=("pad",)))


def build_classifier(start: Start, data: RunData) -> PlannedTraining:
    """The model, and the trainer that carries out the plan over `data`."""
    model = classification.build_model(start.recipe, start.config, data, start.process)
    return classification.build_trainer(start.recipe, start.process, start.run, model, start.tokenizer, data)


def train_classifier(start: Start, data: RunData, before_finishing: Callable[[Trained], None] | None = None) -> Trained:
    """Build, train and save; the main process says where the model is. Every rank must call it.

    Args:
        start, data: the frame and the documents.
        before_finishing: what the main process does with the saved model before the run counts as finished; a
            RunFault of it is the run's.

    Raises:
        Preempted, RunFault, UserError: see `PlannedTraining.train`; RUN/status.json says which.
    """
    trainer = build_classifier(start, data)
    with supervised(start.run, start.process):
        trainer.train()
        saved = classification.save(start.recipe, start.run, trainer, start.tokenizer)
        trained = Trained(start.run, trainer, saved)
        if saved is not None:
            print(f"model       {start.run.model}: {saved}")
            if before_finishing is not None:
                before_finishing(trained)
    return trained
