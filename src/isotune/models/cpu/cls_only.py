"""The last block of an encoder for the [CLS] token of each document only, because a classification head reads no other.

The blocks below need every token, since [CLS] attends to all of them. In the last block only keys and values do: the
head discards the outputs of all other tokens. So the queries, the output projection and the feed-forward layer run for
one token per document, which saves 5/6 of the products of this block.

    hidden states     [ a0 a1 a2 | b0 b1 ]  ->  keys and values of all tokens, queries of a0 and b0  ->  [ a0 b0 ]
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig

from isotune.compat.torch import is_patched, patch_forward, unpatch_forward
from isotune.compat.transformers import attention_of
from isotune.models.packed_attention import PACKED


@contextlib.contextmanager
def cls_states_only(encoder: Any, config: PreTrainedConfig) -> Iterator[None]:
    """Within it the output of a model's encoder is the state of each document's first token, [1, documents, size].

    Only for packed rows, with gradients off, and for the model types in BLOCKS; otherwise nothing changes.
    """
    blocks, cls_forward = getattr(encoder, "layer", None), BLOCKS.get(config.model_type)
    packed = attention_of(config) == PACKED and not getattr(config, "is_decoder", False)
    if cls_forward is None or not packed or not isinstance(blocks, nn.ModuleList) or is_patched(blocks[-1]):
        yield
        return
    last: Any = blocks[-1]

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None or torch.is_grad_enabled():
            return self.stock_forward(hidden_states, *args, **kwargs)
        return cls_forward(self, hidden_states, bounds)

    patch_forward(last, forward)
    try:
        yield
    finally:
        unpatch_forward(last)


def _bert(block: Any, states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    cls_states, attention = states[:, bounds[:-1].long()], block.attention.self
    query, key, value = attention.query(cls_states), attention.key(states), attention.value(states)
    attended = _attend(attention, query, key, value, bounds)
    return block.feed_forward_chunk(block.attention.output(attended, cls_states))


def _distilbert(block: Any, states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    cls_states, attention = states[:, bounds[:-1].long()], block.attention
    query, key, value = attention.q_lin(cls_states), attention.k_lin(states), attention.v_lin(states)
    attended = attention.out_lin(_attend(attention, query, key, value, bounds))
    normed = block.sa_layer_norm(attended + cls_states)
    return block.output_layer_norm(block.ffn(normed) + normed)


BLOCKS = dict.fromkeys(("bert", "camembert", "roberta", "xlm-roberta"), _bert) | {"distilbert": _distilbert}


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """One query per document, [1, documents, heads * size], over the document's keys and values, [1, tokens, ...]."""
    q, k, v = (t.unflatten(2, (-1, module.attention_head_size)).transpose(1, 2) for t in (query, key, value))
    outputs = [
        functional.scaled_dot_product_attention(
            q[:, :, i : i + 1], k[:, :, start:stop], v[:, :, start:stop], scale=module.scaling
        )
        for i, (start, stop) in enumerate(pairwise(bounds.tolist()))
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
