"""Evaluation and prediction of a drop-in trainer: one prediction a row, in the order of the rows, and one division."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from isotune.data.batch_schedule import StepSchedule
from isotune.data.documents import Documents, Rows
from isotune.distributed.engines import is_wrapped_in_place
from isotune.drop_in.own_loss import OwnLoss
from isotune.drop_in.predictions import predictions_of, rows_of, tokens_of
from isotune.io.errors import UserError
from isotune.training.tasks import EvaluationRun, Task
from isotune.training.trainer import PlannedTraining


@dataclass(frozen=True)
class Laid:
    """Rows that a dataset was made into."""

    documents: Documents
    rows: Rows
    targets: np.ndarray | None  # by document what a classifier's loss is made of, as the dataset has it
    labelled: bool  # whether there is a loss to compute
    packed: bool = False  # whether a row of the dataset holds several documents
    column: str | None = None  # of its labels

    @property
    def has_classes(self) -> bool:
        """Whether the targets are one whole number a row, or tokens."""
        return self.targets is None or (self.targets.ndim == 1 and self.targets.dtype.kind in "iu")


class DropInEvaluation(PlannedTraining):
    """The library's `evaluate` and `predict`, over the rows of a schedule."""

    causal: bool
    own_loss: OwnLoss | None
    _planned_loss: Any  # the compute_loss_func that the plan is made with
    _unlabelled: bool
    _packed: bool
    _targets: np.ndarray | None
    _evaluated: Task  # what computes the loss of the rows that are evaluated

    if TYPE_CHECKING:  # of DropIn, which lays rows out

        def _lay_out(self, dataset: Any, row_tokens: int | None = None, *, keep_all: bool = False) -> Laid: ...
        def _schedule(self, laid: Laid, task: Task, batch: int, **options: Any) -> StepSchedule: ...
        def _batches_of(self, own: OwnLoss, laid: Laid, dataset: Any) -> None: ...

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The rows of an evaluation set, by its name where there are several."""
        if isinstance(eval_dataset, str):
            eval_dataset = cast(Any, self.eval_dataset)[eval_dataset]
        return self.get_test_dataloader(self.eval_dataset if eval_dataset is None else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The rows of any dataset, with the model, for `evaluation_loop`."""
        laid = self._lay_out(test_dataset, keep_all=True)
        step = self._schedule(laid, self.plan.task, len(laid.rows), shuffle=False).step(0)
        model: Any = self.model_wrapped
        if model is self.model and not is_wrapped_in_place(model):  # before training
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise UserError("evaluate and predict come after train() under an engine that shards the model")
            model = model.to(self.args.device)
        run = EvaluationRun(model, step, laid.documents, self.accelerator, self.watchdog, self.state.global_step)
        self._unlabelled, self._targets, self._packed = not laid.labelled, laid.targets, laid.packed
        self._evaluated = self._task_of(laid, test_dataset)
        return run

    def _task_of(self, laid: Laid, dataset: Any) -> Task:
        """What computes the loss of these rows; UserError where their labels are not of the kind that is trained."""
        own = self.own_loss
        if own is None and laid.labelled and not laid.has_classes:
            if self.train_dataset is not None:
                there = cast(np.ndarray, laid.targets)[0].tolist()
                raise UserError(
                    f"row 1 of the dataset has {there} in {laid.column!r}, and the train_dataset has classes, "
                    "whole numbers"
                )
            own = OwnLoss(self, self.plan.task, self.causal)  # planned before these rows were known
        if own is None:
            return self.plan.task
        if laid.labelled and id(laid.documents) not in own.batches:
            self._batches_of(own, laid, dataset)
        return own

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The exact loss, and where predictions are wanted one a row, in the order of the rows."""
        run, labelled = dataloader, not self._unlabelled
        if self.compute_loss_func is not self._planned_loss:
            raise UserError("compute_loss_func was changed since: give it to the constructor, or train() first")
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        metrics: dict[str, Any] = {}
        if labelled:
            with self.accelerator.autocast():  # before training no engine has wrapped the model yet
                found = self._evaluated.evaluate(run)
            metrics = found if self.compute_metrics is None else {"eval_loss": found["eval_loss"]}
        predictions = labels = None
        if not loss_only:
            if self._packed:
                raise UserError(
                    "predictions are one a document: give the dataset before it is packed, or say "
                    "prediction_loss_only=True"
                )
            make = self.label_of(run.documents, self._targets)
            with self.accelerator.autocast():
                predictions = predictions_of(run, make, self.preprocess_logits_for_metrics, causal=self.causal)
            labels = rows_of(make, range(len(run.documents))) if labelled and make is not None else None
            if self.compute_metrics is not None and labels is not None:
                inputs = {}
                if "inputs" in self.args.include_for_metrics:
                    inputs = {"inputs": rows_of(lambda n: tokens_of(run.documents, n), range(len(run.documents)))}
                own = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels, **inputs))
                prefix = f"{metric_key_prefix}_"
                metrics |= {f"eval_{str(name).removeprefix(prefix)}": value for name, value in dict(own).items()}
        prefix = f"{metric_key_prefix}_"
        plain = cast(dict[str, Any], denumpify_detensorize(metrics))
        named = {prefix + name.removeprefix("eval_"): value for name, value in plain.items()}
        return EvalLoopOutput(predictions=predictions, label_ids=labels, metrics=named, num_samples=len(run.documents))  # type: ignore[arg-type]  (as stock, None where there are none)

    def label_of(self, documents: Documents, targets: np.ndarray | None) -> Any:
        """The labels of a row as the library's collators make them: its class, or tokens with -100; None without."""
        if targets is not None:
            return lambda row: targets[row]
        if not self.causal:
            return None
        return lambda row: tokens_of(documents, row, supervised_only=True)
