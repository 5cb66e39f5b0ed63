"""Sequence classifiers on rows of documents: the stock model of every architecture, with an exact summed loss.

Whether the documents run packed, padded or one at a time is measured on the loaded model: `layouts/choose.py`.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from isotune.compat.peft import base_model_of, given_arguments
from isotune.compat.torch import patch_forward, unpatch_forward
from isotune.compat.transformers import set_sharded_classes
from isotune.data.tokenizer import prefix_of, tokenizer_name
from isotune.io.errors import UserError
from isotune.models.class_loss import DocumentLoss, loss_of, task_type_of
from isotune.models.cpu.cls_only import cls_states_only
from isotune.models.cpu.functional import onednn_products
from isotune.models.cpu.layers import keep_freed_memory
from isotune.models.layouts.choose import choose_layout, is_empty
from isotune.models.layouts.heads import pad_like_tokenizer
from isotune.models.layouts.layout import ALONE, FIRST, LAST, Layout, Logits, install_layout
from isotune.models.packed_attention import PACKED

# the layout of each installed model, and its logits in it
_layouts: weakref.WeakKeyDictionary[nn.Module, tuple[Layout, Logits]] = weakref.WeakKeyDictionary()


def install_classification(
    model: PreTrainedModel, class_loss: DocumentLoss | None = None, longest: int | None = None
) -> Layout:
    """Make a stock classifier accept packed rows (`isotune.data.batch_schedule.PackedInputs`).

    Then `model(input_ids=..., cu_seq_lens_q=..., targets=...)` returns `.logits`, [documents, outputs], and `.loss`,
    the fp32 sum over the documents: of `class_loss` in training, of its plain form in evaluation, so that runs with
    different class weights can be compared; by default the loss of the configuration's `problem_type`. `token_type_ids`
    are left out for a model that knows none. Without `cu_seq_lens_q` the stock forward runs. Call it before peft wraps
    the model. Returns how documents run inside: no document has more than `longest` tokens, where given, and short ones
    may be packed where a window would end. UserError where the model is right in no layout.
    """
    before = _layouts.get(model)
    if before is not None:  # of an earlier trainer: another loss, on what is installed already
        unpatch_forward(model)
    layout = choose_layout(model, longest)
    set_sharded_classes(model, _block_classes(model))
    logits_of = before[1] if before is not None and before[0] == layout else install_layout(model, layout)
    loss = class_loss or loss_of(task_type_of(model.config))
    has_types = takes_token_types(model)

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
        given = given_arguments(kwargs)
        if not has_types:
            given.pop("token_type_ids", None)
        logits = logits_of(self, input_ids, cu_seq_lens_q, given)
        chosen = loss if self.training else loss.plain
        summed = None if targets is None else chosen.summed(logits, targets)
        return SequenceClassifierOutput(loss=summed, logits=logits)  # type: ignore[arg-type]  (a FloatTensor)

    patch_forward(model, forward)
    _layouts[model] = layout, logits_of
    return layout


def takes_token_types(model: Any) -> bool:
    """Whether a model tells the two texts of a pair apart by the token types that it is given."""
    types = getattr(model.config.get_text_config(), "type_vocab_size", None)
    return types != 1 and "token_type_ids" in inspect.signature(model.base_model.forward).parameters


def check_first_token(model: PreTrainedModel, layout: Layout, tokenizer: Any) -> None:
    """UserError where the head reads the special token before a text, and the tokenizer puts none there."""
    is_measured = not is_empty(model)  # on one process at least
    if is_measured and layout.reads == FIRST and not prefix_of(tokenizer):
        raise UserError(
            f"the tokenizer {tokenizer_name(tokenizer)} puts no special token before a text, and the head of "
            f"model type '{model.config.model_type}' reads that one: take the model's own tokenizer"
        )


def fit_tokenizer(model: PreTrainedModel, layout: Layout, tokenizer: Any) -> str | None:
    """Let a head that is trained read what its tokenizer writes; a sentence where the configuration changes.

    The tokenizer, which is saved beside the head, fills batches up on the right, where that changes no logit.
    """
    check_first_token(model, layout, tokenizer)
    if layout.name != ALONE:
        tokenizer.padding_side = "right"
    return pad_like_tokenizer(model, tokenizer.pad_token_id) if layout.reads == LAST else None


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
