"""Classification: the cross-entropy of the documents' classes."""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from isotune.data.batch_schedule import Step
from isotune.data.documents import Documents
from isotune.distributed.collectives import gather_by_number, gather_vectors, ordered_sum
from isotune.models.class_loss import ClassLoss
from isotune.training.evaluation import EvaluationRun


class ClassificationTask:
    """Loss summed over documents, weighted by class where the recipe says so, divided by the weights' sum.

    Args:
        documents: of training, with their labels.
        num_labels: classes.
        class_loss: class weights and label smoothing of the training loss.
        attention: what the encoder attends by.
        write_predictions: given the step and the lines of predictions.jsonl, on the main process; None writes none.
    """

    item, target = "documents", "documents"

    def __init__(
        self,
        documents: Documents,
        num_labels: int,
        class_loss: ClassLoss,
        attention: str,
        write_predictions: Callable[[int, str], None] | None = None,
    ) -> None:
        self.documents, self.num_labels, self.class_loss = documents, num_labels, class_loss
        self.attention, self.write_predictions = attention, write_predictions

    def denominator(self, step: Step) -> float:
        """The summed class weights of the global batch; without weights, its documents."""
        documents = [document for microbatch in step.microbatches for document in microbatch.documents]
        return self.class_loss.denominator(self.documents.labels[documents])

    def count(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Documents whose class got the highest logit, with dropout on."""
        return (outputs.logits.detach().argmax(dim=1) == inputs["targets"]).sum()

    def train_metrics(self, step: Step, count: int) -> dict[str, float]:
        """The accuracy of the step's documents in training itself."""
        return {"accuracy": count / step.documents}

    def evaluate(self, run: EvaluationRun) -> dict[str, float]:
        """Exact metrics of the evaluation documents, one prediction each.

        Returns:
            eval_loss in nats per document, without weights or smoothing; eval_accuracy, eval_f1_macro,
            eval_documents, eval_seconds.
        """
        from sklearn import metrics  # imported where it is used: it takes a second

        started = time.perf_counter()
        losses, logits = predict(run, self.num_labels)
        documents: Any = run.loader.documents
        labels, chosen = np.asarray(documents.labels), logits.argmax(dim=1).numpy()
        if self.write_predictions is not None:
            self.write_predictions(run.global_step, _prediction_lines(documents, logits))
        return {
            "eval_loss": ordered_sum(losses) / len(documents),
            "eval_accuracy": int((chosen == labels).sum()) / len(documents),
            "eval_f1_macro": float(metrics.f1_score(labels, chosen, average="macro")),
            "eval_documents": len(documents),
            "eval_seconds": time.perf_counter() - started,
        }


def predict(run: EvaluationRun, num_labels: int) -> tuple[list[float], torch.Tensor]:
    """The summed loss of each microbatch, and logits as float64 [documents, classes] on the CPU of every rank."""
    losses: dict[int, torch.Tensor] = {}
    logits: dict[int, torch.Tensor] = {}
    for microbatch, outputs in run.outputs():
        if microbatch.weight:
            losses[microbatch.number] = outputs.loss
            logits.update(zip(microbatch.documents, outputs.logits, strict=True))
    gathered = gather_vectors(logits, len(run.loader.documents), num_labels, run.device)
    return gather_by_number(losses, len(run.loader.step.microbatches), run.device), gathered


def _prediction_lines(documents: Documents, logits: torch.Tensor) -> str:
    """A line a document: its id, its class, and what was predicted."""
    chosen, shares = logits.argmax(dim=1).tolist(), logits.softmax(dim=1).tolist()
    columns = zip(documents.ids.tolist(), documents.labels.tolist(), chosen, shares, strict=True)
    names = ("id", "label", "prediction", "probabilities")
    return "".join(json.dumps(dict(zip(names, column, strict=True))) + "\n" for column in columns)
