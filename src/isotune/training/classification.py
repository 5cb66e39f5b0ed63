"""The parts of a classification run that differ from instruction tuning; the others are those of `training.sft`."""

import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from isotune.checkpoint.final_model import FinalModelReport
from isotune.checkpoint.resume import Resumption
from isotune.checkpoint.unshard import reshard
from isotune.config import ClassificationRecipe
from isotune.data.batch_schedule import Step, assign_to_ranks
from isotune.data.collate import collate
from isotune.data.documents import Documents
from isotune.data.run_data import RunData
from isotune.distributed.collectives import gather_by_number, gather_vectors, ordered_sum
from isotune.distributed.launch import Process
from isotune.models.class_loss import ClassLoss, choose_weights
from isotune.models.classifier import PADDED, head_of, install_classification, load_classifier
from isotune.models.cpu.speedups import enable_speedups
from isotune.models.lora import add_adapters
from isotune.models.opening import load_config
from isotune.run.run_dir import RunDir
from isotune.training import sft
from isotune.training.callbacks.epoch_averages import EpochAverages
from isotune.training.trainer import PlanTrainer

PREDICTIONS = "predictions.jsonl"


def build_model(recipe: ClassificationRecipe, config: PreTrainedConfig, data: RunData, process: Process) -> nn.Module:
    """The classifier ready for unpadded training, for the classes of `data`: attention, loss and adapters in place.

    Built from the seed alone, so every rank has the same weights before any communication.

    Raises:
        UserError: see `load_classifier`, or class_weights does not fit the classes.
    """
    class_loss = class_loss_of(recipe, data.train)
    if class_loss.class_weights is not None and process.is_main:
        print(f"weights     of classes 0 to K - 1: {', '.join(f'{weight:.4g}' for weight in class_loss.class_weights)}")
    config.num_labels = data.train.num_labels
    if names := data.train.class_names:
        config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    base = load_classifier(recipe, config, process.loading_device(recipe))
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
) -> PlanTrainer:
    """The plan, and the trainer that carries it out; checks run when training begins."""
    return sft.build_trainer(recipe, process, run, model, tokenizer, data, ClassificationTrainer)


def save(recipe: ClassificationRecipe, run: RunDir, trainer: PlanTrainer, tokenizer: Any) -> FinalModelReport | None:
    """Write RUN/model as `isotune.training.sft.save` does; an adapter holds its head."""
    num_labels = trainer.train_data.num_labels  # type: ignore[union-attr]

    def load_again(recipe: ClassificationRecipe) -> PreTrainedModel:
        config = load_config(recipe)
        config.num_labels = num_labels
        return load_classifier(recipe, config, torch.device("cpu"))

    return sft.save(recipe, run, trainer, tokenizer, load_again)


class ClassificationTrainer(PlanTrainer):
    """Carries out a plan over labelled documents: a document is a row, and its label is its one target."""

    item, target = "documents", "documents"

    def __init__(self, *, model: nn.Module, **parts: Any) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.attention = base.config._attn_implementation
        super().__init__(model=model, **parts)
        self.class_loss = class_loss_of(parts["recipe"], parts["train"])
        self.training_figures = EpochAverages()

    def _restore(self, resumption: Resumption) -> None:
        super()._restore(resumption)
        self.training_figures = EpochAverages(resumption.metrics)

    def denominator(self, step: Step) -> float:
        """The summed class weights of the global batch; without weights, its documents."""
        documents = [document for microbatch in step.microbatches for document in microbatch.documents]
        return self.class_loss.denominator(self.train_data.documents.labels[documents])  # type: ignore[union-attr]

    def count(self, found: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Documents whose class the pass gave the highest logit, dropout and all."""
        return (found.logits.detach().argmax(dim=1) == inputs["targets"]).sum()

    def figures(self, step: Step, count: int) -> dict[str, float]:
        """The share of the step's documents that training itself got right."""
        return {"accuracy": count / step.documents}

    def measure(self) -> dict[str, float]:
        """Figures of the evaluation documents, each exact; every prediction goes to RUN/eval/STEP.

        Returns:
            eval_loss in nats per document, without weights or smoothing; eval_accuracy, eval_f1_macro,
            eval_documents, eval_seconds.
        """
        started = time.perf_counter()
        losses, logits = predict(self)
        documents: Any = self.evaluation.documents  # type: ignore[union-attr]
        labels, chosen = np.asarray(documents.labels), logits.argmax(dim=1).numpy()
        if self.process.is_main:
            folder = self.run.path / "eval" / f"step-{self.state.global_step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            self.run.fence.put(folder / PREDICTIONS, _lines(documents, logits))
        return {
            "eval_loss": ordered_sum(losses) / len(documents),
            "eval_accuracy": int((chosen == labels).sum()) / len(documents),
            "eval_f1_macro": f1_macro(labels, chosen),
            "eval_documents": len(documents),
            "eval_seconds": time.perf_counter() - started,
        }


def f1_macro(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean F1 of the classes that stand among labels or predictions, int [documents] each; as scikit-learn's."""
    classes = int(max(labels.max(), predictions.max())) + 1
    hits, wanted, said = (
        np.bincount(values, minlength=classes) for values in (labels[labels == predictions], labels, predictions)
    )
    present = wanted + said > 0
    return float(np.mean(2 * hits[present] / (wanted + said)[present]))


@torch.no_grad()
def predict(trainer: PlanTrainer) -> tuple[list[float], torch.Tensor]:
    """The summed loss of each pass over the evaluation documents, and float64 [documents, classes] logits on CPU."""
    assert trainer.eval_plan is not None and trainer.evaluation is not None
    model: Any = trainer.model_wrapped
    mode = model.training
    model.eval()
    step = trainer.eval_plan.step(0)
    losses: dict[int, torch.Tensor] = {}
    scores: dict[int, torch.Tensor] = {}
    classes = int(trainer.train_data.num_labels)  # type: ignore[union-attr]
    process = trainer.process
    for microbatch in assign_to_ranks(step, process.world_size)[process.rank]:
        inputs: Any = trainer._prepare_inputs(collate(trainer.evaluation.documents, microbatch))  # type: ignore[arg-type]
        found = model(**inputs, use_cache=False)
        if microbatch.weight:
            losses[microbatch.number] = found.loss
            scores.update(zip(microbatch.documents, found.logits, strict=True))
        trainer.watchdog.progress(f"the evaluation after step {trainer.state.global_step}")
    model.train(mode)
    reshard(model)
    device = trainer.args.device
    logits = gather_vectors(scores, len(trainer.evaluation.documents), classes, device)
    return gather_by_number(losses, len(step.microbatches), device), logits


def _lines(documents: Documents, logits: torch.Tensor) -> str:
    """A line a document: its id, its class, and what was predicted."""
    chosen, shares = logits.argmax(dim=1).tolist(), logits.softmax(dim=1).tolist()
    columns = zip(documents.ids.tolist(), documents.labels.tolist(), chosen, shares, strict=True)
    names = ("id", "label", "prediction", "probabilities")
    return "".join(json.dumps(dict(zip(names, column, strict=True))) + "\n" for column in columns)
