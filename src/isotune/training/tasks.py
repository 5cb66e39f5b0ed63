"""What is learned, as an update and an evaluation see it: instruction tuning, and classification."""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from isotune.checkpoint.engine_state import reshard
from isotune.config.task_types import MULTI_LABEL, SINGLE_LABEL
from isotune.data.batch_schedule import Microbatch, Step, collate, share_of_rank, to_device
from isotune.data.classification.predictions import prediction_lines
from isotune.data.classification.thresholds import THRESHOLD, Thresholds
from isotune.data.documents import Documents
from isotune.distributed.ranks import gather_by_number, gather_vectors, ordered_sum
from isotune.distributed.watchdog import Watchdog
from isotune.io.errors import UserError
from isotune.models.class_loss import DocumentLoss
from isotune.models.layouts.fitting import FittingBatches
from isotune.models.packed_attention import PACKED
from isotune.training.label_kinds import KINDS, LabelKind, ManyLabels
from isotune.training.router_loss import RouterLoss


@dataclass(frozen=True)
class EvaluationRun:
    """One evaluation: each microbatch of the evaluation documents once, on whichever rank has it."""

    model: nn.Module  # as it trains, wrapped by its engine
    step: Step  # of the evaluation's schedule, which has one
    documents: Documents
    accelerator: Any
    watchdog: Watchdog  # told of every microbatch
    global_step: int  # optimizer updates done
    fitting: FittingBatches = field(default_factory=lambda: FittingBatches(halves=False))

    def __iter__(self) -> Iterator[Any]:
        """UserError: there are no batches."""
        raise UserError(
            "the loader of an evaluation has no batches: evaluate() and predict() take it, and for batches of your own "
            "make a DataLoader of the dataset"
        )

    @torch.no_grad()
    def outputs(self, *, targets: bool = True) -> Iterator[tuple[Microbatch, Any]]:
        """Each microbatch of this rank with what the model returns for it, in evaluation mode.

        Without `targets` that is the logits of every token or document, and no loss. A microbatch that the device has
        no memory for may come in parts, which have its number. One of weight 0 keeps a rank in step with the others:
        its outputs count nowhere.
        """
        was_training = self.model.training
        self.model.eval()
        # DDP's forward copies buffers between ranks, of which one may run more forwards than another
        model = self.accelerator.unwrap_model(self.model) if self.fitting.halves else self.model
        lengths = self.documents.lengths

        def tokens(documents: Sequence[int]) -> int:
            return int(lengths[list(documents)].sum())

        def forward(documents: Sequence[int]) -> Any:
            inputs: Any = to_device(collate(self.documents, documents), self.accelerator.device)
            if not targets:
                inputs = {name: v for name, v in inputs.items() if name not in ("targets", "supervised_positions")}
            return model(**inputs, use_cache=False)

        state = self.accelerator
        for microbatch in share_of_rank(self.step, state.num_processes, state.process_index):
            for documents, outputs in self.fitting.run(microbatch.documents, tokens, forward):
                yield replace(microbatch, documents=documents), outputs
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
        self,
        step: Step,
        microbatches: Sequence[dict[str, Any]],
        outputs: Callable[[dict[str, Any]], Any],
        device: torch.device,
    ) -> None:
        """Before an update: this rank's `microbatches`, and `outputs`, what the model returns for one, on `device`.

        `outputs` returns None where the device ran out of memory; the update is then repeated in smaller microbatches,
        and only what the ranks tell each other here is still to be done.
        """

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
    router_loss: RouterLoss | None = None  # of a mixture of experts, where it is asked for
    _denominator: float = field(default=1.0, init=False)

    def denominator(self, step: Step) -> float:
        """Supervised tokens of the global batch, over all ranks."""
        return step.supervised_tokens

    def begin(
        self,
        step: Step,
        microbatches: Sequence[dict[str, Any]],
        outputs: Callable[[dict[str, Any]], Any],
        device: torch.device,
    ) -> None:
        """Count what the routers choose in the whole global batch, where they are balanced."""
        if self.router_loss is not None:
            self._denominator = self.denominator(step)
            self.router_loss.look_ahead(step, microbatches, outputs, device)

    def inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With the routers' logits asked for, where they are balanced."""
        return inputs if self.router_loss is None else {**inputs, "output_router_logits": True}

    def loss(self, outputs: Any, microbatch: dict[str, Any]) -> torch.Tensor:
        """The summed loss of the supervised tokens, and what the microbatch adds to the routers' loss."""
        if self.router_loss is None:
            return outputs.loss
        return outputs.loss + self._denominator * self.router_loss.part(outputs.router_logits)

    def train_metrics(self, step: Step, count: int) -> dict[str, float]:
        """The routers' loss of the global batch, without its coefficient, where it is trained."""
        return {} if self.router_loss is None else {"router_loss": self.router_loss.value}

    def evaluate(self, run: EvaluationRun) -> dict[str, float]:
        """eval_loss in nats per supervised token, eval_perplexity, eval_supervised_tokens, eval_seconds.

        One exact number, not a mean of batches' means, whatever the microbatches and the number of ranks.
        """
        started = time.perf_counter()
        losses: dict[int, torch.Tensor] = {}
        for microbatch, outputs in run.outputs():
            if microbatch.weight:
                losses[microbatch.number] = losses.get(microbatch.number, 0.0) + outputs.loss
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
    class_loss: DocumentLoss  # of training, with class weights and label smoothing
    attention: str  # what the encoder attends by
    # given the step and the lines of predictions.jsonl, on the main process
    write_predictions: Callable[[int, str], None] | None = None
    class_names: Sequence[str] | None = None  # None where the classes have no names
    task_type: str = SINGLE_LABEL  # what the documents are labelled with
    thresholds: Thresholds = THRESHOLD  # from which a document has a label, where it has any number of them

    @cached_property
    def kind(self) -> LabelKind:
        """What is measured of such labels."""
        return ManyLabels(self.thresholds) if self.task_type == MULTI_LABEL else KINDS[self.task_type]

    def denominator(self, step: Step) -> float:
        """What the loss of the global batch is divided by: its documents, for a start."""
        return self.class_loss.denominator(self.documents.labels[step.microbatches.documents])

    def count(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Documents that are right, with dropout on."""
        return self.kind.count(outputs.logits.detach(), inputs["targets"])

    def train_metrics(self, step: Step, count: int) -> dict[str, float]:
        """The share of the step's documents that were right in training itself: accuracy, or exact_match."""
        return {} if self.kind.share is None else {self.kind.share: count / step.documents}

    def evaluate(self, run: EvaluationRun) -> dict[str, float]:
        """eval_loss per document (no weights, no smoothing), and the metrics of the kind of labels.

        Exact: one prediction a document. They are written as predictions.jsonl where `write_predictions` is given.
        """
        started = time.perf_counter()
        losses: dict[int, torch.Tensor] = {}
        own_logits: dict[int, torch.Tensor] = {}
        for microbatch, outputs in run.outputs():
            if microbatch.weight:
                losses[microbatch.number] = losses.get(microbatch.number, 0.0) + outputs.loss
                own_logits.update(zip(microbatch.documents, outputs.logits, strict=True))
        documents: Any = run.documents
        logits = gather_vectors(own_logits, len(documents), self.num_labels, run.accelerator.device)
        labels, outputs = np.asarray(documents.labels), self.kind.outputs(logits)
        loss = ordered_sum(run.gather(losses)) / self.class_loss.plain.denominator(labels)
        if self.write_predictions is not None:
            ids = documents.ids.tolist()
            lines = prediction_lines(self.task_type, ids, labels, outputs, self.class_names, self.thresholds)
            self.write_predictions(run.global_step, "".join(json.dumps(line) + "\n" for line in lines))
        return {
            "eval_loss": loss,
            **{f"eval_{name}": value for name, value in self.kind.metrics(labels, outputs).items()},
            "eval_documents": len(documents),
            "eval_seconds": time.perf_counter() - started,
        }
