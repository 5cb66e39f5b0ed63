"""A classification run: its model and trainer, and the frame of every script around the script's own data.

start = start_classifier(recipe)        processes, run folder, tokenizer
data = ...                              the script's own: documents with a class each
trained = train_classifier(start, data) model, trainer, steps, RUN/model
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from isotune.checkpoint.final_model import FinalModelReport
from isotune.checkpoint.resume import open_run
from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of
from isotune.config import ClassificationRecipe
from isotune.data.documents import RunData
from isotune.distributed.launch import Process, start_process
from isotune.models.classifier import PADDED, ClassLoss, choose_weights, install_classification
from isotune.models.cpu.layers import enable_speedups
from isotune.models.lora import add_adapters
from isotune.models.opening import load_base_model, load_config, load_tokenizer
from isotune.run.preemption import supervised
from isotune.run.run_dir import RunDir
from isotune.training.from_recipe.assembly import build, save
from isotune.training.tasks import ClassificationTask
from isotune.training.trainer import PlannedTraining, Trainer

PREDICTIONS = "predictions.jsonl"


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

    Raises AlreadyDone for a finished run, and UserError where any of these is not what the recipe says.
    """
    process = start_process(recipe)
    run = open_run(recipe)
    return Start(recipe, process, run, load_config(recipe), load_tokenizer(recipe, needed=("pad",)))


def train_classifier(start: Start, data: RunData, before_finishing: Callable[[Trained], None] | None = None) -> Trained:
    """Build, train and save; the main process says where the model is. Every rank must call it.

    `before_finishing` is what the main process does with the saved model before the run counts as finished; a RunFault
    of it is the run's. RUN/status.json says which error ended a run.
    """
    trainer = build_classifier(start, data)
    with supervised(start.run, start.process):
        trainer.train()
        saved = save(start.recipe, start.run, trainer, start.tokenizer)
        trained = Trained(start.run, trainer, saved)
        if saved is not None:
            print(f"model       {start.run.model}: {saved}")
            if before_finishing is not None:
                before_finishing(trained)
    return trained


def build_classifier(start: Start, data: RunData) -> PlannedTraining:
    """The model, and the trainer that carries out the plan over `data`."""
    model = build_model(start.recipe, start.config, data, start.process)
    return build_trainer(start.recipe, start.process, start.run, model, start.tokenizer, data)


def build_model(recipe: ClassificationRecipe, config: PreTrainedConfig, data: RunData, process: Process) -> nn.Module:
    """The classifier ready for unpadded training, for the classes of `data`: attention, loss and adapters in place.

    Built from the seed alone, so every rank has the same weights before any communication. Raises UserError as
    `load_base_model` does, or where class_weights does not fit the classes.
    """
    class_loss = _class_loss(recipe, data.train)
    if class_loss.class_weights is not None and process.is_main:
        print(f"weights     of classes 0 to K - 1: {', '.join(f'{weight:.4g}' for weight in class_loss.class_weights)}")
    config.num_labels = data.train.num_labels  # type: ignore[assignment]  (labelled data has classes)
    if names := data.train.class_names:
        config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    base = load_base_model(recipe, config, process.loading_device(recipe))
    if install_classification(base, class_loss) == PADDED and process.is_main:
        print(f"note        model type '{config.model_type}' is not known to work without padding: texts are padded")
    model = base if recipe.tune == "full" else add_adapters(base, recipe)
    enable_speedups(model)
    return model


def build_trainer(
    recipe: ClassificationRecipe,
    process: Process,
    run: RunDir,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
) -> PlannedTraining:
    """The schedule, and the Trainer that carries it out; checks run when training begins."""
    train: Any = data.train

    def write_predictions(step: int, lines: str) -> None:
        folder = run.path / "eval" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        run.lease.write_file(folder / PREDICTIONS, lines)

    task = ClassificationTask(
        train.documents,
        int(train.num_labels),
        _class_loss(recipe, train),
        str(attention_of(base_model_of(model).config)),
        write_predictions if process.is_main else None,
    )
    return build(Trainer, recipe, process, run, model, tokenizer, data, task)


def _class_loss(recipe: ClassificationRecipe, train: Any) -> ClassLoss:
    """The loss that the recipe asks for; a UserError where class_weights does not fit the training data's classes."""
    weights = choose_weights(recipe.class_weights, np.asarray(train.documents.labels), train.num_labels)
    return ClassLoss(weights, recipe.label_smoothing_factor)
