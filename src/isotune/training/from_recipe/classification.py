"""The parts of a classification run, each built by one function that the launch script calls in order."""

import functools
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from isotune.checkpoint.final_model import FinalModelReport
from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of
from isotune.config import ClassificationRecipe
from isotune.data.documents import RunData
from isotune.distributed.launch import Process
from isotune.models.class_loss import ClassLoss, choose_weights
from isotune.models.classifier import PADDED, install_classification
from isotune.models.cpu.layers import enable_speedups
from isotune.models.heads import head_of
from isotune.models.lora import add_adapters
from isotune.models.opening import load_base_model, load_config
from isotune.run.run_dir import RunDir
from isotune.training.from_recipe import assembly
from isotune.training.from_recipe.arguments import training_arguments
from isotune.training.tasks.classification import ClassificationTask
from isotune.training.trainer import PlannedTraining, Trainer

PREDICTIONS = "predictions.jsonl"


def build_model(recipe: ClassificationRecipe, config: PreTrainedConfig, data: RunData, process: Process) -> nn.Module:
    """The classifier ready for unpadded training, for the classes of `data`: attention, loss and adapters in place.

    Built from the seed alone, so every rank has the same weights before any communication.

    Raises:
        UserError: see `load_base_model`, or class_weights does not fit the classes.
    """
    class_loss = class_loss_of(recipe, data.train)
    if class_loss.class_weights is not None and process.is_main:
        print(f"weights     of classes 0 to K - 1: {', '.join(f'{weight:.4g}' for weight in class_loss.class_weights)}")
    config.num_labels = data.train.num_labels  # type: ignore[assignment]  (labelled data has classes)
    if names := data.train.class_names:
        config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    base = load_base_model(recipe, config, process.loading_device(recipe))
    if install_classification(base, class_loss) == PADDED and process.is_main:
        print(f"note        model type '{config.model_type}' is not known to work without padding: texts are padded")
    model = base if recipe.tune == "full" else add_adapters(base, recipe, head=head_of(config))
    enable_speedups(model)
    return model


def class_loss_of(recipe: ClassificationRecipe, train: Any) -> ClassLoss:
    """The loss that the recipe asks for, over the labels of the training data.

    Raises:
        UserError: class_weights does not fit the classes.
    """
    labels = np.asarray(train.documents.labels)
    weights = choose_weights(recipe.class_weights, labels, train.num_labels)
    return ClassLoss(weights, recipe.label_smoothing_factor)


def build_trainer(
    recipe: ClassificationRecipe,
    process: Process,
    run: RunDir,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
) -> PlannedTraining:
    """The schedule, and the Trainer that carries it out; checks run when training begins."""
    base = base_model_of(model)
    train: Any = data.train

    def write_predictions(step: int, lines: str) -> None:
        folder = run.path / "eval" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        run.lease.write_file(folder / PREDICTIONS, lines)

    task = ClassificationTask(
        train.documents,
        int(train.num_labels),
        class_loss_of(recipe, train),
        str(attention_of(base.config)),
        write_predictions if process.is_main else None,
    )
    make = functools.partial(Trainer, args=training_arguments(recipe, process), processing_class=tokenizer)
    return assembly.build(make, model, recipe, process, run, data, task, with_averages=True)


def save(
    recipe: ClassificationRecipe, run: RunDir, trainer: PlannedTraining, tokenizer: Any
) -> FinalModelReport | None:
    """Write RUN/model; an adapter holds its head. See `isotune.training.from_recipe.assembly.save`."""
    num_labels = trainer.plan.documents.num_labels

    def load_again(recipe: ClassificationRecipe) -> PreTrainedModel:
        config = load_config(recipe)
        config.num_labels = num_labels
        return load_base_model(recipe, config, torch.device("cpu"))

    return assembly.save(recipe, run, trainer, tokenizer, load_again)
