"""Any loss of logits, over the whole global batch: that of a user's script, and of the library's options.

A loss of a batch is rarely the mean of its parts' losses: class weights are divided by their sum, contrastive losses
compare all rows. So the logits of all microbatches come first, without a graph; the loss is computed once, on every
rank, of the padded batch that the library's collator makes of all rows of the update; and its gradient to the logits of
a microbatch is what that microbatch's own forward is differentiated with, under the same dropout:

    logits of all microbatches -> loss(batch, logits) -> dloss/dlogits -> sum(logits * dloss/dlogits).backward()

That is a second forward. A loss that is a sum over rows divided by `num_items_in_batch` needs none, and a measurement
on random logits tells which it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from trl.trainer.utils import FusedCausalLMOutput

from isotune.compat.transformers import items_in_batch
from isotune.compat.trl import metrics_kept
from isotune.data.batch_schedule import Step
from isotune.data.datasets import IGNORED
from isotune.data.documents import Documents
from isotune.distributed.ranks import gather_parts, ordered_sum
from isotune.drop_in.model_loss import loss_of_logits
from isotune.io.errors import UserError, first_line
from isotune.training.tasks import EvaluationRun, Task

Batch = dict[str, Any]  # of tensors, as the library's collator pads rows
MakeBatch = Callable[[Sequence[int]], Batch]  # of rows by their numbers in the data
PROBE_ROWS = 5
TOLERANCE = 1e-5  # relative, of two ways to compute a loss of random logits in fp32


@dataclass(eq=False)
class OwnLoss(Task):
    """A loss that a trainer's `compute_loss` makes of the logits."""

    trainer: Any
    inner: Task  # how documents run in the model
    causal: bool
    batches: dict[int, MakeBatch] = field(default_factory=dict[int, MakeBatch])  # by the identity of the documents
    adds_up: bool = False  # whether the loss of a microbatch, given the items of the update, is its share
    of_model: bool = False  # whether it asks the model for a loss
    documents: Documents | None = None  # of training
    _items: Any = field(default=None, init=False)  # of the update
    _value: float = field(default=0.0, init=False)  # the loss of the update
    _first: int = field(default=0, init=False)  # the microbatch that carries it
    _gradients: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor], init=False)  # by document

    def __post_init__(self) -> None:
        self.item, self.target, self.attention = self.inner.item, self.inner.target, self.inner.attention

    def probe(self, documents: Documents) -> None:
        """Measure on a few rows with random logits whether the loss adds up; UserError where it has no such form."""
        self.documents = documents
        rows = list(range(min(PROBE_ROWS, len(documents))))
        generator = torch.Generator().manual_seed(0)
        config = self.trainer.accelerator.unwrap_model(self.trainer.model).config
        outputs = config.get_text_config().vocab_size if self.causal else config.num_labels
        lengths = [int(documents.lengths[row]) if self.causal else 1 for row in rows]
        shape = lambda n: (n, outputs) if self.causal else (outputs,)  # noqa: E731
        logits = [torch.randn(shape(n), generator=generator).to(self.trainer.args.device) for n in lengths]
        logits[0].requires_grad_()
        with metrics_kept(self.trainer):
            self._measure(documents, rows, logits)

    def _measure(self, documents: Documents, rows: list[int], logits: list[torch.Tensor]) -> None:
        whole, items = self._loss(documents, rows, logits)
        self._check_sources(whole, logits[0])
        if items is None or len(rows) < 2:
            return
        parts = [self._loss(documents, [row], [one], items)[0] for row, one in zip(rows, logits, strict=True)]
        halved, _ = self._loss(documents, rows, logits, 2 * items)
        value, added = float(whole.detach()), sum(float(part.detach()) for part in parts)
        error = max(abs(added - value), abs(2 * float(halved.detach()) - value))
        self.adds_up = value != 0 and error <= TOLERANCE * abs(value)  # a loss of 0 says nothing of its parts

    def _check_sources(self, loss: torch.Tensor, logits: torch.Tensor) -> None:
        """Refuse what an update would not differentiate: it knows the gradient to the logits alone."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        of_logits, *of_weights = (
            torch.autograd.grad(loss, [logits, *trained.values()], allow_unused=True) if loss.requires_grad else [None]
        )
        if of_logits is None:
            raise UserError("compute_loss makes no use of the logits of the model that it is given")
        read = next((name for name, one in zip(trained, of_weights, strict=True) if one is not None), None)
        if read is not None:
            raise UserError(
                f"compute_loss reads weights of the model beside its logits ({read}), which no update would "
                "differentiate: for a penalty on weights say weight_decay"
            )

    # ---- of an update ----

    def denominator(self, step: Step) -> float:
        """The loss is divided by itself."""
        return 1.0

    def begin(
        self, step: Step, microbatches: Sequence[Any], outputs: Callable[[Any], Any], device: torch.device
    ) -> None:
        """The items of the update, or its loss and the gradient to every logit of this rank."""
        assert self.documents is not None
        rows = sorted(step.microbatches.documents.tolist())
        if self.adds_up:
            self._items = items_in_batch(self.trainer, self._batch(self.documents, rows))
            return
        found: dict[int, torch.Tensor] = {}
        for microbatch in microbatches:
            if microbatch["weight"]:
                found |= self._by_document(self.documents, microbatch["documents"], outputs(microbatch).logits)
            else:  # in step with the other ranks
                outputs(microbatch)
        logits = [part.requires_grad_() for part in self._gathered(self.documents, rows, found)]
        with torch.enable_grad():
            loss, _ = self._loss(self.documents, rows, logits)
            gradients = torch.autograd.grad(loss, logits, allow_unused=True)
        self._value, self._first = float(loss.detach()), step.microbatches[0].number
        # a rank without work repeats a microbatch of another
        own = {document for microbatch in microbatches for document in microbatch["documents"]}
        self._gradients = {
            row: torch.zeros_like(part) if gradient is None else gradient
            for row, part, gradient in zip(rows, logits, gradients, strict=True)
            if row in own
        }

    def inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without targets a model returns logits."""
        return {name: value for name, value in inputs.items() if name not in ("targets", "supervised_positions")}

    def loss(self, outputs: Any, microbatch: dict[str, Any]) -> torch.Tensor:
        """Its share of the loss; where it has none of its own, the first microbatch carries the value of all."""
        assert self.documents is not None
        found = self._by_document(self.documents, microbatch["documents"], outputs.logits)
        if self.adds_up:
            rows = sorted(found)
            return self._loss(self.documents, rows, [found[row] for row in rows], self._items)[0]
        products = [(logits * self._gradients[row]).sum() for row, logits in found.items()]
        share = torch.stack(products).sum()
        return share - share.detach() + (self._value if microbatch["number"] == self._first else 0.0)

    # ---- of an evaluation ----

    def evaluate(self, run: EvaluationRun) -> dict[str, float]:
        """eval_loss: the loss of all rows at once."""
        rows = list(range(len(run.documents)))
        items = items_in_batch(self.trainer, self._batch(run.documents, rows)) if self.adds_up else None
        losses: dict[int, torch.Tensor] = {}
        found: dict[int, torch.Tensor] = {}
        for microbatch, outputs in run.outputs(targets=False):
            logits = self._by_document(run.documents, microbatch.documents, outputs.logits)
            if self.adds_up:  # of every microbatch: the ranks may talk in there
                own = sorted(logits)
                loss, _ = self._loss(run.documents, own, [logits[row] for row in own], items)
                losses |= {microbatch.number: loss} if microbatch.weight else {}
            elif microbatch.weight:
                found |= logits
        run.model.eval()  # as the library leaves it: by this TRL's compute_loss and log tell what they are called for
        if self.adds_up:
            return {"eval_loss": ordered_sum(run.gather(losses))}
        return {"eval_loss": float(self._loss(run.documents, rows, self._gathered(run.documents, rows, found))[0])}

    # ---- parts ----

    def _by_document(
        self, documents: Documents, chosen: Sequence[int], logits: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """The logits of a microbatch in fp32: [tokens, vocabulary] of each document, or [classes]."""
        parts = logits[0].split(documents.lengths[list(chosen)].tolist()) if self.causal else logits
        return {document: part.float() for document, part in zip(chosen, parts, strict=True)}

    def _gathered(
        self, documents: Documents, rows: Sequence[int], own: dict[int, torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """The logits of these documents from whichever rank has them."""
        place = {row: number for number, row in enumerate(rows)}
        return gather_parts(
            {place[row]: logits if self.causal else logits[None] for row, logits in own.items()},
            [int(documents.lengths[row]) if self.causal else 1 for row in rows],
            self.trainer.args.device,
        )

    def _batch(self, documents: Documents, rows: Sequence[int]) -> Batch:
        batch = self.batches[id(documents)](documents.ids[list(rows)].tolist())
        device = self.trainer.args.device
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def _loss(
        self, documents: Documents, rows: Sequence[int], logits: Sequence[torch.Tensor], items: Any = None
    ) -> tuple[torch.Tensor, Any]:
        """The loss of some rows with these logits, and the number of items that it was given."""
        batch = self._batch(documents, rows)
        filled = self._filled(batch, logits, documents.lengths[list(rows)].tolist())
        items = items_in_batch(self.trainer, batch) if items is None else items
        answer = LogitsOnly(self.trainer.accelerator.unwrap_model(self.trainer.model), filled, self.causal)
        try:
            loss = self.trainer.compute_loss(answer, batch, num_items_in_batch=items)
        except UserError:
            raise
        except Exception as error:  # whatever a user's function raises
            raise UserError(f"compute_loss cannot be computed from the logits alone: {first_line(error)}") from error
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise UserError("compute_loss returns no single number")
        self.of_model = answer.was_asked_for_loss
        return loss.reshape(()).float(), items

    def _filled(self, batch: Batch, logits: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """Logits where the batch has its tokens, else zeros: [rows, longest, vocabulary], or [rows, classes]."""
        if not self.causal:
            return torch.stack([one.reshape(-1) for one in logits])
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        if mask.sum(dim=1).tolist() != list(lengths):
            raise UserError("the data_collator makes rows of another length: prepare them in the dataset")
        whole = logits[0].new_zeros(*ids.shape, logits[0].shape[-1])
        return whole.index_put((mask,), torch.cat(list(logits)))


class LogitsOnly:
    """Stands for a model in `compute_loss`: called once, it returns logits that are known already, and their loss."""

    def __init__(self, model: Any, logits: torch.Tensor, causal: bool) -> None:
        self.model, self.logits, self.causal = model, logits, causal
        self.was_called = self.was_asked_for_loss = False

    def __call__(
        self, *_: Any, labels: Any = None, num_items_in_batch: Any = None, fused_lm_head: bool = False, **__: Any
    ) -> Any:
        """With labels the loss of the library for this kind of model too; TRL asks for `fused_lm_head`."""
        if self.was_called and torch.is_grad_enabled():
            raise UserError("compute_loss calls the model twice, and only one forward pass can be planned")
        self.was_called = True
        if fused_lm_head:
            return _of_each_token(self.logits, labels)
        loss = None
        if labels is not None:
            self.was_asked_for_loss = True
            loss = loss_of_logits(self.model, self.logits, labels, num_items_in_batch, causal=self.causal)
        return SequenceClassifierOutput(loss=loss, logits=self.logits)  # type: ignore[arg-type]  (a FloatTensor)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the model's."""
        return getattr(cast(nn.Module, self.model), name)


def _of_each_token(logits: torch.Tensor, labels: torch.Tensor) -> FusedCausalLMOutput:
    """What TRL's fused head returns: of each predicted token [rows, longest - 1], zero where nothing is supervised."""
    scores, targets = logits[:, :-1].log_softmax(-1), labels[:, 1:]
    mask = targets != IGNORED
    chosen = scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return FusedCausalLMOutput(
        log_probs=torch.where(mask, chosen, 0.0),
        entropy=torch.where(mask, -(scores.exp() * scores).sum(-1), 0.0),
        is_top1=(scores.argmax(-1) == targets) & mask,
        label_mask=mask,
    )
