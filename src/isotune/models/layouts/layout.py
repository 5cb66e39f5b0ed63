"""How a classifier is given the documents of a microbatch: packed, padded, or one at a time; its head is the stock one.

A microbatch arrives as one row. Packed, the base model gets this row, and the head gets the states that it reads of
each document, as if they were a batch:

    states of the base   [ a0 a1 a2 | b0 b1 | c0 c1 c2 c3 ]       first   [ a0 ]  last  [ a2 ]  all  [ a0 a1 a2 .  ]
    cu_seq_lens_q        [ 0, 3, 5, 9 ]                                   [ b0 ]        [ b1 ]       [ b0 b1 .  .  ]
                                                                          [ c0 ]        [ c3 ]       [ c0 c1 c2 c3 ]

So BERT's pooler, RoBERTa's dense, Llama's `score` and ModernBERT's mean run unchanged. Padded, the whole model gets a
batch filled up on the right, and a mask. One at a time is for models in which padding changes a document, such as
BigBird's blocks. `choose.py` measures which of the three a model is right in.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from isotune.compat.torch import patch_forward
from isotune.io.errors import UserError
from isotune.models.document_keys import MicrobatchDocuments, current_documents, known_documents
from isotune.models.layouts.heads import POOLER
from isotune.models.layouts.padding import padded_batch
from isotune.models.packed_attention import PACKED, document_position_ids, lengths_of

PADDED, ALONE = "padded", "alone"
FIRST, LAST, ALL = "first", "last", "all"
SET_TYPE = "set_attention_type"  # a method of BigBird's base model
NO_TOKEN = -1  # the token that pads where the configuration has none: no document has it

Inputs = dict[str, Any]  # what the model is called with beside its token ids
# (model, ids int64 [1, tokens], bounds int32 [documents + 1], inputs) -> logits [documents, classes]
Logits = Callable[[Any, torch.Tensor, torch.Tensor, Inputs], torch.Tensor]
_SHARED = MicrobatchDocuments([0], [1], padded=True)


@dataclass(frozen=True)
class Layout:
    """How a classifier gets its documents, and why not packed."""

    name: str  # packed, padded or alone
    reads: str = FIRST  # which states of a document the head reads: first, last or all
    blocks: str = ""  # name below the base model of the module whose output the head reads; "" is the base model
    reason: str = ""  # why it is not packed
    shared: tuple[str, ...] = ()  # dropout modules whose input is the same for all documents


@dataclass(frozen=True)
class _Row:
    """The packed row whose forward runs."""

    inputs: Inputs  # of the base model
    pick: Callable[[torch.Tensor], torch.Tensor]  # from the states [1, tokens, size] to the head's [documents, ., size]


def packed_logits(model: Any, layout: Layout) -> tuple[Logits, Callable[[], Any]]:
    """The logits of documents in a row, and a function that takes the hooks away that `model` gets for it."""
    running = list[_Row]()
    names = tuple(inspect.signature(model.base_model.forward).parameters)

    def give_row(_: nn.Module, args: tuple, kwargs: Inputs) -> Any:
        if not running:
            return None
        given = dict(zip(names, args, strict=False)) | kwargs | running[-1].inputs
        return (), given | {"attention_mask": None}

    def logits(model: Any, ids: torch.Tensor, bounds: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        config, row = model.config.get_text_config(), inputs | {"input_ids": ids, "cu_seq_lens_q": bounds}
        row.setdefault("cu_seq_lens_k", bounds)
        if "position_ids" in names:
            row["position_ids"] = document_position_ids(model.config, bounds, ids.shape[1])
        head, pick = _head_inputs(layout.reads, ids, bounds, config.pad_token_id)
        running.append(_Row(row, pick))
        try:
            with padding_token(config):
                return _stock(model, **head)
        finally:
            running.pop()

    hooks = [model.base_model.register_forward_pre_hook(give_row, with_kwargs=True)]
    hooks += on_states(model, layout.blocks, lambda states: running[-1].pick(states) if running else states)
    return logits, lambda: [hook.remove() for hook in hooks]


def on_states(model: Any, blocks: str, change: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """Hooks by which the head of a model reads `change(states)` of the states that its blocks return.

    Where the base model runs its blocks itself, its pooler reads them before they are returned.
    """
    base = model.base_model
    hooks = [base.get_submodule(blocks).register_forward_hook(lambda _, args, output: _with_states(output, change))]
    pooler = getattr(base, POOLER, None)
    if not blocks and isinstance(pooler, nn.Module):
        hooks.append(pooler.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:])))
    return hooks


def padded_logits(model: Any, ids: torch.Tensor, bounds: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The stock logits of documents that are filled up on the right."""
    config = model.config.get_text_config()
    pad = config.pad_token_id
    texts, mask = padded_batch(ids, bounds, NO_TOKEN if pad is None else pad)
    batch = {"input_ids": texts, "attention_mask": mask}
    batch |= {name: _filled(values, bounds) for name, values in inputs.items() if _is_by_token(values, ids)}
    _set_attention_type(model, texts.shape[1])
    with padding_token(config), _embeddable(model.base_model) if pad is None else contextlib.nullcontext():
        return _stock(model, **batch)


def alone_logits(model: Any, ids: torch.Tensor, bounds: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The stock logits of one document after the other: nothing that one draws at random depends on another."""
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UserError(
            f"model type '{model.config.model_type}' is computed one text at a time, which gradient_checkpointing "
            "cannot repeat: set gradient_checkpointing to false"
        )
    lengths, microbatch, state = lengths_of(bounds), current_documents(), torch.get_rng_state()
    by_token = {name: values.split(lengths, 1) for name, values in inputs.items() if _is_by_token(values, ids)}
    outputs = []
    for number, text in enumerate(ids.split(lengths, 1)):
        torch.set_rng_state(state)
        own = {name: parts[number] for name, parts in by_token.items()}
        with _only(microbatch, number):
            outputs.append(padded_logits(model, text, bounds.new_tensor([0, lengths[number]]), own))
    return torch.cat(outputs)


def share_dropout(module: nn.Module) -> None:
    """Let a dropout module draw one mask for all documents of a step: that of a tensor that belongs to none of them."""

    def forward(self: Any, input: torch.Tensor) -> Any:
        with known_documents(_SHARED) if current_documents() is not None else contextlib.nullcontext():
            return self.stock_forward(input)

    if "stock_forward" not in vars(module):
        patch_forward(module, forward)


def restore_attention_type(model: nn.Module) -> None:
    """Undo what texts changed in a model, wrapped or not, that attends in another way to short ones."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, SET_TYPE):
            cast(Any, module).set_attention_type(module.config.attention_type)


def sparse_beyond(config: Any) -> int | None:
    """The longest text, in tokens, to which BigBird attends in full; None for a model without such a switch."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return None
    return (5 + 2 * config.num_random_blocks) * config.block_size


def _set_attention_type(model: Any, tokens: int) -> None:
    """Choose what a fresh BigBird would for a text of so many tokens: itself it stays with what a short one got."""
    limit = sparse_beyond(model.config)
    if limit is not None and hasattr(model.base_model, SET_TYPE):
        with torch.random.fork_rng([]):  # a new module draws weights, which those of the old one replace
            model.base_model.set_attention_type("original_full" if tokens <= limit else model.config.attention_type)


def _only(microbatch: MicrobatchDocuments | None, number: int) -> contextlib.AbstractContextManager[None]:
    if microbatch is None:
        return contextlib.nullcontext()
    one = MicrobatchDocuments([microbatch.numbers[number]], [microbatch.lengths[number]], padded=True)
    return known_documents(one)


def _stock(model: Any, **inputs: Any) -> torch.Tensor:
    forward = getattr(model, "stock_forward", None) or model.forward
    if "use_cache" in inspect.signature(forward).parameters:
        inputs["use_cache"] = False
    return forward(**inputs, return_dict=True).logits


def _head_inputs(
    reads: str, ids: torch.Tensor, bounds: torch.Tensor, pad: int | None
) -> tuple[Inputs, Callable[[torch.Tensor], torch.Tensor]]:
    """Token ids and mask as the head sees them, and what makes its states of those of the row."""
    if reads == ALL:
        filled, mask = padded_batch(ids, bounds, NO_TOKEN if pad is None else pad)
        return {"input_ids": filled, "attention_mask": mask}, lambda states: _filled(states, bounds)
    starts = bounds[:-1].long()
    places = starts if reads == FIRST else _last_places(ids[0], bounds.long(), pad)

    def pick(states: torch.Tensor) -> torch.Tensor:
        # as many states as documents: `fast_evaluation` computed these alone, or every document has one token
        return (states[0] if states.shape[1] == len(places) else states[0, places])[:, None]

    chosen = ids[0, places][:, None]
    return {"input_ids": chosen, "attention_mask": torch.ones_like(chosen)}, pick


def _last_places(ids: torch.Tensor, bounds: torch.Tensor, pad: int | None) -> torch.Tensor:
    """The place in the row of each document's last token that does not pad, int64 [documents], as stock heads choose.

    Without such a token it is the first, and where nothing pads the last of all.
    """
    if pad is None:
        return bounds[1:] - 1
    places = torch.arange(len(ids), device=ids.device)
    last = torch.where(ids == pad, -1, places).cummax(0).values[bounds[1:] - 1]
    return torch.maximum(last, bounds[:-1])


def _filled(row: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The documents of a row [1, tokens, ...] as a batch [documents, longest, ...], filled up on the right."""
    documents = list(row[0].split(lengths_of(bounds)))
    return nn.utils.rnn.pad_sequence(documents, batch_first=True)


def _is_by_token(values: Any, ids: torch.Tensor) -> bool:
    return isinstance(values, torch.Tensor) and values.shape[:2] == ids.shape


def _with_states(output: Any, pick: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(output, torch.Tensor):
        return pick(output)
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = pick(output.last_hidden_state)
        return output
    return (pick(output[0]), *output[1:])


@contextlib.contextmanager
def padding_token(config: Any) -> Iterator[None]:
    """Within it a configuration of texts without a pad token has one that no document contains: heads ask for one."""
    before = config.pad_token_id
    if before is None:
        config.pad_token_id = NO_TOKEN
    try:
        yield
    finally:
        config.pad_token_id = before


@contextlib.contextmanager
def _embeddable(base: nn.Module) -> Iterator[None]:
    """Within it a base model takes token 0 for the token that is none."""

    def clamp(_: nn.Module, args: tuple, kwargs: Inputs) -> Any:
        if args:
            return (args[0].clamp(min=0), *args[1:]), kwargs
        return args, kwargs | {"input_ids": kwargs["input_ids"].clamp(min=0)}

    hook = base.register_forward_pre_hook(clamp, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def install_layout(model: Any, layout: Layout) -> Logits:
    """The function of a model's logits in this layout; what it needs inside is installed for good."""
    for name in layout.shared:
        share_dropout(model.get_submodule(name))
    if layout.name == PACKED:
        return packed_logits(model, layout)[0]
    return padded_logits if layout.name == PADDED else alone_logits
