"""Sequence classifiers on rows of documents: the stock model of every architecture, with an exact summed loss.

Whether the documents run packed, padded or one at a time is measured on the loaded model: `layouts/choose.py`.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from isotune.compat.peft import base_model_of, given_arguments
from isotune.compat.torch import patch_forward, unpatch_forward
from isotune.compat.transformers import set_sharded_classes
from isotune.io.errors import UserError
from isotune.models.cpu.cls_only import cls_states_only
from isotune.models.cpu.functional import onednn_products
from isotune.models.cpu.layers import keep_freed_memory
from isotune.models.layouts.choose import choose_layout
from isotune.models.layouts.layout import FIRST, LAST, Layout, Logits, install_layout
from isotune.models.packed_attention import PACKED

# the layout of each installed model, and its logits in it
_layouts: weakref.WeakKeyDictionary[nn.Module, tuple[Layout, Logits]] = weakref.WeakKeyDictionary()


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


def install_classification(
    model: PreTrainedModel, class_loss: ClassLoss | None = None, longest: int | None = None
) -> Layout:
    """Make a stock classifier accept packed rows (`isotune.data.batch_schedule.PackedInputs`).

    Then `model(input_ids=..., cu_seq_lens_q=..., targets=...)` returns `.logits`, [documents, classes], and `.loss`,
    the fp32 sum over the documents: of `class_loss` in training, of the plain cross-entropy in evaluation, so that runs
    with different class weights can be compared. Without `cu_seq_lens_q` the stock forward runs. Call it before peft
    wraps the model. Returns how documents run inside: no document has more than `longest` tokens, where given, and
    short ones may be packed where a window would end. UserError where the model is right in no layout.
    """
    before = _layouts.get(model)
    if before is not None:  # of an earlier trainer: another loss, on what is installed already
        unpatch_forward(model)
    layout = choose_layout(model, longest)
    set_sharded_classes(model, _block_classes(model))
    logits_of = before[1] if before is not None and before[0] == layout else install_layout(model, layout)

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
        logits = logits_of(self, input_ids, cu_seq_lens_q, given_arguments(kwargs))
        chosen = (class_loss if self.training else None) or PLAIN_LOSS
        loss = None if targets is None else chosen.summed(logits, targets)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]  (a FloatTensor)

    patch_forward(model, forward)
    _layouts[model] = layout, logits_of
    return layout


def pad_like_tokenizer(model: PreTrainedModel, layout: Layout, pad: int | None) -> str | None:
    """Let a head that reads the last token that does not pad know which token its tokenizer pads with.

    Otherwise plain transformers refuses batches of the saved model, or reads a padding token. Returns a sentence where
    the configuration changes.
    """
    config = model.config.get_text_config()
    before = config.pad_token_id
    if layout.reads != LAST or pad is None or before == pad:
        return None
    config.pad_token_id = pad
    return f"the head reads the last token other than {pad}, with which the tokenizer pads; the base said {before}"


def _block_classes(model: PreTrainedModel) -> list[str]:
    """Class names of the encoder's blocks, which FSDP2 shards one by one.

    accelerate 1.15 shards the input embeddings apart from them, and fails where transformers 5.23 lists a module around
    the embeddings as a block too (BertEmbeddings); for DistilBERT and ALBERT transformers lists none.
    """
    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return sorted({type(block).__name__ for block in stacks[0]}) if stacks else []


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
            layout, _ = _layouts.get(base, (None, None))
            if layout is not None and layout.name == PACKED and layout.reads == FIRST:
                within.enter_context(cls_states_only(base.base_model.get_submodule(layout.blocks), base.config))
        yield
