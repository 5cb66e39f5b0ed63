"""What is learned, as an update and an evaluation see it: instruction tuning, and classification."""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from isotune.checkpoint.engine_state import reshard
from isotune.data.batch_schedule import Microbatch, Step, assign_to_ranks, collate, to_device
from isotune.data.documents import Documents
from isotune.distributed.ranks import Watchdog, gather_by_number, gather_vectors, ordered_sum
from isotune.models.classifier import ClassLoss
from isotune.models.packed_attention import PACKED


@dataclass(frozen=True)
class EvaluationRun:
    """One evaluation: each microbatch of the evaluation documents once, on whichever rank has it."""

    model: nn.Module  # as it trains, wrapped by its engine
    step: Step  # of the evaluation's schedule, which has one
    documents: Documents
    accelerator: Any
    watchdog: Watchdog  # told of every microbatch
    global_step: int  # optimizer updates done

    @torch.no_grad()
    def outputs(self, *, targets: bool = True) -> Iterator[tuple[Microbatch, Any]]:
        """Each microbatch of this rank with what the model returns for it, in evaluation mode.

        Without `targets` that is the logits of every token or document, and no loss.

        A microbatch of weight 0 keeps a rank in step with the others: its outputs count nowhere.
        """
        was_training = self.model.training
        self.model.eval()
        for microbatch in assign_to_ranks(self.step, self.accelerator.num_processes)[self.accelerator.process_index]:
            inputs: Any = to_device(collate(self.documents, microbatch), self.accelerator.device)
            if not targets:
                inputs = {name: v for name, v in inputs.items() if name not in ("targets", "supervised_positions")}
            yield microbatch, self.model(**inputs, use_cache=False)
            self.watchdog.progress(f"the evaluation after step {self.global_step}")
        self.model.train(was_training)
        reshard(self.model)

    def gather(self, values: dict[int, torch.Tensor]) -> list[float]:
        """One number of every microbatch, from the rank that has it."""
        return gather_by_number(values, len(self.step.microbatches), self.accelerator.device)


class Task(ABC):
    """What a model learns: a microbatch's forward returns a summed loss, which the update divides by `denominator`."""

    attention: str  # what the model must attend by when training begins
    item: str  # what the rows of the schedule are called in messages
    target: str  # what the targets of the loss are called in metrics.jsonl

    @property
    def pads(self) -> bool:
        """Whether the model fills its texts up to one length, instead of taking them end to end."""
        return self.attention != PACKED

    @abstractmethod
    def denominator(self, step: Step) -> float:
        """What the summed loss of the global batch is divided by."""

    def begin(  # noqa: B027  (most tasks need no look ahead)
        self, step: Step, microbatches: Sequence[dict[str, Any]], outputs: Callable[[dict[str, Any]], Any]
    ) -> None:
        """Before an update: this rank's `microbatches`, and `outputs`, what the model returns for one of them."""

    def inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with, of what `collate` made."""
        return inputs

    def loss(self, outputs: Any, microbatch: dict[str, Any]) -> torch.Tensor:
        """The summed loss of a microbatch, fp32 [], from what the model returned for it."""
        return outputs.loss

    def count(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor | None:  # noqa: B027  (not every task counts)
        """A whole number of one microbatch, int64 [], to be added up over the global batch; None is zero."""

    def train_metrics(self, step: Step, count: int) -> dict[str, float]:
        """What the step's line has beside its loss, from the added counts."""
        return {}

    @abstractmethod
    def evaluate(self, run: EvaluationRun) -> dict[str, float]:
        """The metrics of the evaluation documents, named eval_*; every rank calls it."""


@dataclass(eq=False)
class SftTask(Task):
    """Instruction tuning: the summed loss of supervised tokens, divided by their number in the global batch."""

    item, target = "rows", "supervised_tokens"
    attention: str = PACKED  # what the model attends by; any other pads the documents of a row

    def denominator(self, step: Step) -> float:
        """Supervised tokens of the global batch, over all ranks."""
        return step.supervised_tokens

    def evaluate(self, run: EvaluationRun) -> dict[str, float]:
        """eval_loss in nats per supervised token, eval_perplexity, eval_supervised_tokens, eval_seconds.

        One exact number, not a mean of batches' means, whatever the microbatches and the number of ranks.
        """
        started = time.perf_counter()
        losses = {microbatch.number: outputs.loss for microbatch, outputs in run.outputs() if microbatch.weight}
        loss = ordered_sum(run.gather(losses)) / run.step.supervised_tokens
        return {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_supervised_tokens": run.step.supervised_tokens,
            "eval_seconds": time.perf_counter() - started,
        }


@dataclass(eq=False)
class ClassificationTask(Task):
    """Loss summed over documents, weighted by class where the recipe says so, divided by the weights' sum."""

    item, target = "documents", "documents"
    documents: Documents  # of training, with their labels
    num_labels: int
    class_loss: ClassLoss  # class weights and label smoothing of the training loss
    attention: str  # what the encoder attends by
    # given the step and the lines of predictions.jsonl, on the main process
    write_predictions: Callable[[int, str], None] | None = None
    class_names: Sequence[str] | None = None  # None where the classes have no names

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
        """eval_loss in nats per document (no weights, no smoothing), eval_accuracy, eval_f1_macro, and their like.

        Exact: one prediction a document. They are written as predictions.jsonl where `write_predictions` is given.
        """
        from sklearn import metrics  # imported where it is used: it takes a second

        started = time.perf_counter()
        losses: dict[int, torch.Tensor] = {}
        own_logits: dict[int, torch.Tensor] = {}
        for microbatch, outputs in run.outputs():
            if microbatch.weight:
                losses[microbatch.number] = outputs.loss
                own_logits.update(zip(microbatch.documents, outputs.logits, strict=True))
        documents: Any = run.documents
        logits = gather_vectors(own_logits, len(documents), self.num_labels, run.accelerator.device)
        loss = ordered_sum(run.gather(losses)) / len(documents)
        labels, chosen = np.asarray(documents.labels), logits.argmax(dim=1).numpy()
        if self.write_predictions is not None:
            self.write_predictions(run.global_step, _prediction_lines(documents, logits, self.class_names))
        return {
            "eval_loss": loss,
            "eval_accuracy": int((chosen == labels).sum()) / len(documents),
            "eval_f1_macro": float(metrics.f1_score(labels, chosen, average="macro")),
            "eval_documents": len(documents),
            "eval_seconds": time.perf_counter() - started,
        }


def _prediction_lines(documents: Documents, logits: torch.Tensor, names: Sequence[str] | None) -> str:
    """A line a document: its id, its class, and what was predicted."""
    labels, chosen = documents.labels.tolist(), logits.argmax(dim=1).tolist()
    columns = {"id": documents.ids.tolist(), "label": labels, "prediction": chosen}
    columns |= {"probabilities": logits.softmax(dim=1).tolist()}
    if names:
        columns |= {"label_name": [names[k] for k in labels], "prediction_name": [names[k] for k in chosen]}
    rows = zip(*columns.values(), strict=True)
    return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
