"""The gradient of an embedding that is also the head, without a second tensor of its size at a step's fullest moment.

A tied weight has two gradients. The head's is dense and comes first; the embedding's comes last, when the gradients of
all other weights are there, and would be another 103 MB of fp32 for 50,272 words of 512 numbers, nearly all zero. Here
only the rows of words that occur are made, and are added to the head's gradient where it lies, just before autograd
hands that to the parameter.

What is computed is the same, to the bit: the gradients of a word that occurs twice are added up first, in their order.
"""

import types
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from isotune.models.cpu.cast_linear import is_whole


def slim_tied_embedding(model: nn.Module) -> bool:
    """Give the input embedding of `model` the leaner gradient, where it is trained and its weight is the head's.

    Returns:
        whether it is so.
    """
    if not hasattr(model, "get_input_embeddings"):
        return False
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    plain = type(embedding) is nn.Embedding and "forward" not in vars(embedding) and embedding.max_norm is None
    tied = plain and getattr(head, "weight", None) is embedding.weight
    if not tied or embedding.scale_grad_by_freq or embedding.sparse or not embedding.weight.requires_grad:
        return False
    changed: Any = embedding
    changed._plain_forward = embedding.forward
    changed.forward = types.MethodType(_forward, embedding)
    return True


def _forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
    lean = torch.is_grad_enabled() and ids.device.type == "cpu" and is_whole(self.weight)
    if not lean or self.weight.dtype not in (torch.float32, torch.float64):  # 16 bits would be rounded in other places
        return self._plain_forward(ids)
    return _Rows.apply(ids, self.weight, self.padding_idx)


class _Rows(torch.autograd.Function):
    """weight[ids], with weight [words, size]; its gradient waits for the head's."""

    @staticmethod
    def forward(ctx: Any, ids, weight, padding_idx) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        words, rows = occurring_rows(ids.flatten(), grad.flatten(0, -2))
        if ctx.padding_idx is not None:
            rows.masked_fill_((words == ctx.padding_idx)[:, None], 0)

        def add(gradient: torch.Tensor | None) -> torch.Tensor:
            hook.remove()
            if gradient is None:
                raise RuntimeError("the embedding has a gradient and the head, to which it is tied, has none")
            # autograd asks hooks to leave what they are given; here that would be the copy that is to be saved, and
            # nobody else holds the sum of the gradients of a leaf before it is the leaf's
            return gradient.index_add_(0, words, rows)

        # The leaf waits for this function too, so the hook is there when the sum of what came is handed over.
        hook = ctx.weight.register_hook(add)
        return None, None, None


def occurring_rows(ids: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of `ids` [tokens], each once, and the sums of their rows of `grad` [tokens, size]."""
    words, places = ids.unique(return_inverse=True)
    return words, grad.new_zeros(len(words), grad.shape[1]).index_add_(0, places, grad)
