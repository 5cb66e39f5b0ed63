"""Sequence classifiers on packed rows: the stock head of every architecture, applied at each document's first token.

A stock head reads the hidden state at position 0 of each padded text. In a packed row these are the states at the
starts of the documents, so they are selected from the encoder's output:

    hidden states   [ a0 a1 a2 | b0 b1 | c0 c1 c2 c3 ]   ->   [ a0 ]   one row per document, of one state: the modules
    cu_seq_lens_q   [ 0, 3, 5, 9 ]                            [ b0 ]   above (BERT's pooler, DistilBERT's
                                                              [ c0 ]   pre_classifier, RoBERTa's dense) are unchanged

Model types that are not in ENCODERS get padded texts, made from the same row.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from isotune.compat.peft import base_model_of, given_arguments
from isotune.compat.torch import patch_forward
from isotune.compat.transformers import attention_of, set_sharded_classes
from isotune.io.errors import UserError
from isotune.models.cpu.cls_only import cls_states_only
from isotune.models.cpu.functional import onednn_products
from isotune.models.cpu.layers import keep_freed_memory
from isotune.models.packed_attention import PACKED, document_position_ids, set_packed_attention

# Name of the encoder in the base model, by model type.
_LIKE_BERT = ("albert", "bert", "camembert", "roberta", "xlm-roberta")
ENCODERS = dict.fromkeys(_LIKE_BERT, "encoder") | {"distilbert": "transformer"}
PADDED = "padded"


@dataclass(frozen=True)
class ClassLoss:
    """Cross-entropy with weights by class (None: all 1) and the share e of each target that is spread over all classes.

    It is torch's `cross_entropy(weight=..., label_smoothing=...)`, split so that a global batch may be divided into any
    microbatches on any ranks: each microbatch yields a sum over its documents, and the total is divided by the summed
    weights of the global batch, which the batch schedule knows.

        loss of a step = sum over documents of [(1 - e) w(y) (-log p(y)) + e/K sum over classes c of w(c) (-log p(c))]
                         ---------------------------------------------------------------------------------------------
                                                      sum over documents of w(y)
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum over documents, in fp32: logits [documents, classes], targets int64 [documents]."""
        scores, given = logits.float(), self.class_weights
        weights = None if given is None else scores.new_tensor(given)
        smoothing = self.label_smoothing
        return functional.cross_entropy(scores, targets, weights, reduction="sum", label_smoothing=smoothing)

    def denominator(self, labels: np.ndarray) -> float:
        """Sum of the weights of documents of these classes, int [documents]; without weights, their number."""
        if self.class_weights is None:
            return len(labels)
        # rounded as in `summed`
        weights = np.array(self.class_weights, np.float32).astype(np.float64)
        return float(np.bincount(labels, minlength=len(weights)) @ weights)


PLAIN_LOSS = ClassLoss()


def choose_weights(
    class_weights: str | Sequence[float] | None, labels: np.ndarray, classes: int
) -> tuple[float, ...] | None:
    """Weights by class, of the recipe's `balanced`, one weight per class, or None.

    `balanced` is scikit-learn's: documents / (classes * documents of the class), so that every class has the same sum
    over the `labels` of the training data, int [documents].
    """
    if class_weights is None:
        return None
    if class_weights == "balanced":
        counts = np.bincount(labels, minlength=classes)
        if not counts.all():
            raise UserError(f"class_weights: balanced: class {int(counts.argmin())} has no row to be weighted by")
        return tuple((len(labels) / (classes * counts)).tolist())
    if len(class_weights) != classes:
        raise UserError(
            f"class_weights has {len(class_weights)} numbers, and the data has {classes} classes: give one for each"
        )
    return tuple(float(weight) for weight in class_weights)


def install_classification(model: PreTrainedModel, class_loss: ClassLoss | None = None) -> str:
    """Make a stock classifier accept packed rows (`isotune.data.batch_schedule.PackedInputs`).

    Then `model(input_ids=..., cu_seq_lens_q=..., targets=...)` returns `.logits`, [documents, classes], and `.loss`,
    the fp32 sum over the documents: of `class_loss` in training, of the plain cross-entropy in evaluation, so that runs
    with different class weights can be compared. Without `cu_seq_lens_q` the stock forward runs. Call it before peft
    wraps the model. Returns `packed`, or `padded` where the model type is not known to work without padding.
    """
    attention, before = PADDED, attention_of(model.config)
    if model.config.model_type in ENCODERS:
        try:
            set_packed_attention(model)
            attention = PACKED
        except UserError:
            model.set_attn_implementation(before or "sdpa")
    set_sharded_classes(model, _block_classes(model))
    stock_inputs = _packed_inputs if attention == PACKED else _padded_inputs

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        *args: Any,
        cu_seq_lens_q: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if cu_seq_lens_q is None:
            return self.stock_forward(input_ids, *args, **kwargs)
        inputs = stock_inputs(self.config, input_ids, cu_seq_lens_q, given_arguments(kwargs))
        logits = self.stock_forward(**inputs, return_dict=True).logits
        chosen = (class_loss if self.training else None) or PLAIN_LOSS
        loss = None if targets is None else chosen.summed(logits, targets)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]  (a FloatTensor)

    patch_forward(model, forward)
    if attention == PACKED:
        _encoder_of(model).register_forward_hook(_select_first_states, with_kwargs=True)
    return attention


def _block_classes(model: PreTrainedModel) -> list[str]:
    """Class names of the encoder's blocks, which FSDP2 shards one by one.

    accelerate 1.15 shards the input embeddings apart from them, and fails where transformers 5.23 lists a module around
    the embeddings as a block too (BertEmbeddings); for DistilBERT and ALBERT transformers lists none.
    """
    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return sorted({type(block).__name__ for block in stacks[0]}) if stacks else []


def _select_first_states(encoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None:
        states = output.last_hidden_state[0]
        # as many states as documents: `fast_evaluation` computed these alone, or every document has one token
        firsts = states if len(states) == len(bounds) - 1 else states[bounds[:-1].long()]
        output.last_hidden_state = firsts[:, None]
    return output


@contextlib.contextmanager
def fast_evaluation(model: Any) -> Iterator[None]:
    """Within it a classifier on CPU is evaluated faster, with logits that differ by rounding only.

    `model` is one after `install_classification`, or a PeftModel around it.
    """
    base = base_model_of(model)
    with contextlib.ExitStack() as within:
        if base.device.type == "cpu":
            keep_freed_memory()
            within.enter_context(onednn_products())
            if base.config.model_type in ENCODERS:
                within.enter_context(cls_states_only(_encoder_of(base), base.config))
        yield


def _encoder_of(model: PreTrainedModel) -> Any:
    return getattr(model.base_model, ENCODERS[model.config.model_type])


def _packed_inputs(config: PreTrainedConfig, input_ids: torch.Tensor, bounds: torch.Tensor, given: dict) -> dict:
    positions = document_position_ids(config, bounds, input_ids.shape[1])
    return {"input_ids": input_ids, "position_ids": positions, "cu_seq_lens_q": bounds, **given}


def _padded_inputs(config: PreTrainedConfig, input_ids: torch.Tensor, bounds: torch.Tensor, given: dict) -> dict:
    texts = input_ids[0].split(bounds.diff().tolist())
    pad = config.pad_token_id or 0
    batch = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": batch, "attention_mask": mask}
