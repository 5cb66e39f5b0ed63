"""The gradient of an embedding that is tied to the head, without a second tensor of its size at the memory peak.

A tied weight has two gradients. The head's is dense and comes first. The embedding's comes last, when the gradients of
all other weights exist, and would be another 103 MB of fp32 for a vocabulary of 50,272 and a width of 512, nearly all
zero. Here only the rows of tokens that occur are computed, and are added in place to the head's gradient, just before
autograd gives it to the parameter.

The result is the same bits: the gradients of a token that occurs twice are summed first, in their order.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from isotune.compat.torch_ops import AutogradFunction
from isotune.models.cpu.cast_linear import is_whole
from isotune.models.forward_patch import is_patched, patch_forward


def slim_tied_embedding(model: nn.Module) -> bool:
    """Patch the input embedding of `model`, where it is trained and tied to the head.

    Returns:
        whether it was patched.
    """
    if not hasattr(model, "get_input_embeddings"):
        return False
    language_model: Any = model
    embedding = language_model.get_input_embeddings()
    head = language_model.get_output_embeddings()
    is_stock = type(embedding) is nn.Embedding and not is_patched(embedding) and embedding.max_norm is None
    tied = is_stock and getattr(head, "weight", None) is embedding.weight
    if not tied or embedding.scale_grad_by_freq or embedding.sparse or not embedding.weight.requires_grad:
        return False
    patch_forward(embedding, _forward)
    return True


def _forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
    applies = torch.is_grad_enabled() and ids.device.type == "cpu" and is_whole(self.weight)
    if not applies or self.weight.dtype not in (torch.float32, torch.float64):  # 16 bits would round differently
        return self.stock_forward(ids)
    return _Rows.apply(ids, self.weight, self.padding_idx)


class _Rows(AutogradFunction):
    """weight[ids], with weight [vocabulary, size]; its gradient is added to the head's."""

    @staticmethod
    def forward(ctx: Any, ids, weight, padding_idx) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (ids,) = ctx.saved_tensors
        tokens, rows = occurring_rows(ids.flatten(), grad.flatten(0, -2))
        if ctx.padding_idx is not None:
            rows.masked_fill_((tokens == ctx.padding_idx)[:, None], 0)

        def add(gradient: torch.Tensor | None) -> torch.Tensor:
            hook.remove()
            if gradient is None:
                raise RuntimeError("the embedding has a gradient and the head, to which it is tied, has none")
            # autograd asks hooks not to change their argument; a copy is what this module avoids, and nothing else
            # refers to the summed gradient of a leaf before the leaf gets it
            return gradient.index_add_(0, tokens, rows)

        # the leaf's gradient waits for this function too, so the hook is registered before the sum is complete
        hook = ctx.weight.register_hook(add)
        return None, None, None


def occurring_rows(ids: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct tokens of `ids` [positions], and the sums of their rows of `grad` [positions, size]."""
    tokens, indices = ids.unique(return_inverse=True)
    return tokens, grad.new_zeros(len(tokens), grad.shape[1]).index_add_(0, indices, grad)
