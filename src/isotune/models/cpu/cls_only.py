"""The last block of an encoder at the documents' first tokens alone, because a classification head reads nothing else.

Below it every token is needed, since the first ones look at all. In the last block only keys and values are: what a
later token would have become there is thrown away by the head. So queries, what follows the attention and the
feed-forward are computed for one token a document, which is 5/6 of the products of one block of 6 or of 12.

    hidden states     [ a0 a1 a2 | b0 b1 ]  ->  keys and values of all five, queries of a0 and b0  ->  [ a0 b0 ]
"""

import contextlib
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig

from isotune.models.packed_attention import PACKED

Block = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def first_states_only(encoder: Any, config: PreTrainedConfig) -> Iterator[None]:
    """Within it the encoder's last hidden states are those of each document's first token, [1, documents, size].

    Only in a packed row, and only while nothing is learned. Encoders of other kinds stay as they are.

    Args:
        encoder: the blocks of a model with this configuration.
    """
    blocks, block = getattr(encoder, "layer", None), BLOCKS.get(config.model_type)
    packed = config._attn_implementation == PACKED and not getattr(config, "is_decoder", False)
    if block is None or not packed or not isinstance(blocks, nn.ModuleList) or "forward" in vars(blocks[-1]):
        yield
        return
    last: Any = blocks[-1]
    plain = last.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None or torch.is_grad_enabled():
            return plain(hidden_states, *args, **kwargs)
        return block(self, hidden_states, bounds)

    last.forward = types.MethodType(forward, last)
    try:
        yield
    finally:
        del last.forward


def _bert(block: Any, states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    firsts, own = states[:, bounds[:-1].long()], block.attention.self
    seen = _attention(own, own.query(firsts), own.key(states), own.value(states), bounds)
    return block.feed_forward_chunk(block.attention.output(seen, firsts))


def _distilbert(block: Any, states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    firsts, own = states[:, bounds[:-1].long()], block.attention
    seen = own.out_lin(_attention(own, own.q_lin(firsts), own.k_lin(states), own.v_lin(states), bounds))
    middle = block.sa_layer_norm(seen + firsts)
    return block.output_layer_norm(block.ffn(middle) + middle)


BLOCKS: dict[str, Block] = {
    "bert": _bert,
    "camembert": _bert,
    "distilbert": _distilbert,
    "roberta": _bert,
    "xlm-roberta": _bert,
}


def _attention(
    own: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """One query a document, [1, documents, heads * size], over the document's keys and values, [1, tokens, ...]."""
    q, k, v = (one.unflatten(2, (-1, own.attention_head_size)).transpose(1, 2) for one in (query, key, value))
    found = [
        functional.scaled_dot_product_attention(
            q[:, :, number : number + 1], k[:, :, start:stop], v[:, :, start:stop], scale=own.scaling
        )
        for number, (start, stop) in enumerate(pairwise(bounds.tolist()))
    ]
    return torch.cat(found, dim=2).transpose(1, 2).flatten(2)
