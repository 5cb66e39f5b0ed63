"""Sequence classifiers on unpadded rows: every architecture's own head, applied at each document's start.

A stock head reads the hidden state at position 0 of each padded text. In a packed row those states stand at the
documents' starts, so they are picked out where the encoder ends:

    hidden states   [ a0 a1 a2 | b0 b1 | c0 c1 c2 c3 ]   ->   [ a0 ]   one row a document, of one state each: whatever
    cu_seq_lens_q   [ 0, 3, 5, 9 ]                            [ b0 ]   stands above (BERT's pooler, DistilBERT's
                                                              [ c0 ]   pre_classifier, RoBERTa's dense) is unchanged

A model type that is not known to work so is given padded texts, made from the same row, and a line says it.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from isotune.config import ClassificationRecipe
from isotune.io.errors import UserError
from isotune.models.class_loss import ClassLoss
from isotune.models.cpu.cls_only import first_states_only
from isotune.models.cpu.onednn_linear import fast_products
from isotune.models.cpu.speedups import keep_freed_memory
from isotune.models.opening import load_base
from isotune.models.packed_attention import PACKED, document_position_ids, restore_attention, set_packed_attention

# Where the encoder of a model type stands in its body; its output is a row of hidden states.
ENCODERS = {
    "albert": "encoder",
    "bert": "encoder",
    "camembert": "encoder",
    "distilbert": "transformer",
    "roberta": "encoder",
    "xlm-roberta": "encoder",
}
# Modules above the encoder: they may be new, and beside LoRA they are trained whole.
HEADS = {"albert": ["pooler", "classifier"], "bert": ["pooler", "classifier"],
         "distilbert": ["pre_classifier", "classifier"]}  # fmt: skip
OTHER_HEADS = ["classifier"]
PADDED = "padded"
PLAIN_LOSS = ClassLoss()


def head_of(config: PreTrainedConfig) -> list[str]:
    """The modules of the classification head, which stand above the encoder."""
    return HEADS.get(config.model_type, OTHER_HEADS)


def load_classifier(recipe: ClassificationRecipe, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """The base model with a head for `config.num_labels` classes; a head that no file has is drawn from the seed.

    Raises:
        UserError: see `isotune.models.opening.load_base`, or the architecture has no classifier.
    """
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(f"model type '{config.model_type}' has no classifier in transformers: choose an encoder")
    return load_base(recipe, config, device, AutoModelForSequenceClassification, may_be_new=head_of(config))


def install_classification(model: PreTrainedModel, class_loss: ClassLoss | None = None) -> str:
    """Teach a stock classifier the packed row of `isotune.data.collate.PackedInputs`.

    With it, `model(input_ids=..., cu_seq_lens_q=..., targets=...)` returns `.logits`, [documents, classes], and as
    `.loss` the sum over the documents in fp32: of `class_loss` in training, of the plain cross-entropies in
    evaluation, so that runs of different weights compare. Without bounds its own forward runs as ever. Call it before
    peft wraps the model.

    Returns:
        how it attends: `packed`, or `padded` where the model type is not known to work without padding.
    """
    kind = _attend(model)
    plain: Any = model
    plain._no_split_modules = _blocks(model)
    plain._plain_forward = model.forward
    plain._class_loss = class_loss or PLAIN_LOSS
    plain.forward = types.MethodType(_packed_forward if kind == PACKED else _padded_forward, model)
    if kind == PACKED:
        _encoder_of(model).register_forward_hook(_keep_first_states, with_kwargs=True)
    return kind


def _blocks(model: PreTrainedModel) -> list[str]:
    """The classes of the encoder's blocks, which FSDP2 shards one by one.

    accelerate 1.15 shards the input embeddings apart from them, and fails where transformers 5.23 names a module around
    those as a block too (BertEmbeddings); for DistilBERT and ALBERT transformers names none.
    """
    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return sorted({type(block).__name__ for block in stacks[0]}) if stacks else []


def _attend(model: PreTrainedModel) -> str:
    if model.config.model_type not in ENCODERS:
        return PADDED
    try:
        set_packed_attention(model)
    except UserError:
        restore_attention(model)
        return PADDED
    return PACKED


def _keep_first_states(encoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None:
        states = output.last_hidden_state[0]
        # as many states as documents: `fast_evaluation` made no others, or every document is one token
        firsts = states if len(states) == len(bounds) - 1 else states[bounds[:-1].long()]
        output.last_hidden_state = firsts[:, None]
    return output


@contextlib.contextmanager
def fast_evaluation(model: Any) -> Iterator[None]:
    """Within it a classifier on CPU is evaluated faster, with the same logits but for rounding.

    Args:
        model: that `install_classification` has seen, or a peft model around it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with contextlib.ExitStack() as within:
        if base.device.type == "cpu":
            keep_freed_memory()
            within.enter_context(fast_products())
            if base.config.model_type in ENCODERS:
                within.enter_context(first_states_only(_encoder_of(base), base.config))
        yield


def _encoder_of(model: PreTrainedModel) -> Any:
    return getattr(model.base_model, ENCODERS[model.config.model_type])


def _packed_forward(
    self: Any,
    input_ids: torch.Tensor,
    *args: Any,
    cu_seq_lens_q: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    if cu_seq_lens_q is None:
        return self._plain_forward(input_ids, *args, **kwargs)
    positions = document_position_ids(self.config, cu_seq_lens_q)
    found = self._plain_forward(
        input_ids, position_ids=positions, cu_seq_lens_q=cu_seq_lens_q, **_said(kwargs), return_dict=True
    )
    return _with_loss(self, found.logits, targets)


def _padded_forward(
    self: Any,
    input_ids: torch.Tensor,
    *args: Any,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    targets: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    if cu_seq_lens_q is None:
        return self._plain_forward(input_ids, *args, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    texts = input_ids[0].split(lengths)
    pad = self.config.pad_token_id or 0
    batch = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    found = self._plain_forward(batch, attention_mask=mask, return_dict=True)
    return _with_loss(self, found.logits, targets)


def _said(kwargs: dict[str, Any]) -> dict[str, Any]:
    """peft's wrapper passes on every argument of its own signature, given or not."""
    return {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}


def _with_loss(model: Any, logits: torch.Tensor, targets: torch.Tensor | None) -> SequenceClassifierOutput:
    class_loss = model._class_loss if model.training else PLAIN_LOSS
    loss = None if targets is None else class_loss.summed(logits, targets)
    return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]
