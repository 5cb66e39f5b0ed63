"""Attention within each document of a packed row, as batched matrix products, because SDPA on CPU is slow.

torch's CPU kernel takes 12.6 ms forward and backward for one bf16 document of 340 tokens and 16 heads of 64; these
products take a third of that. A document is computed from its own rows only, in shapes that depend on its own length
only, so its neighbours cannot change its bits.

The causal triangle is split into blocks of query rows, and each block stops at its last visible key:

    queries 0-127    [#\\          ]
    queries 128-255  [####\\       ]      # computed    \\ masked on the diagonal    blank: never computed
    queries 256-320  [########\\   ]

With a window of w keys each block begins at the first key that one of its queries sees, so a document costs what the
window says and not its square:

    queries 256-320  [    ####\\   ]

Scores and softmax are fp32; the other products run in the inputs' dtype. Where scores reach 20, scores rounded to bf16
would make errors four to seven times those of torch's kernel. Nothing of size [heads, tokens, tokens] is kept after its
block, unless `keep_weights` is set: the backward pass recomputes the weights and their dropout masks (recomputation:
Chen et al. 2016; Dao et al. 2022, arXiv:2205.14135).
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from isotune.compat.torch import AutogradFunction, softmax_backward
from isotune.models.attention_form import AttentionForm
from isotune.models.cpu.functional import Workspace, as_mask, draw_kept, masked
from isotune.models.document_keys import draw_document_keys, index_keys, quantised_drop

QUERIES_PER_BLOCK = 128  # as fast as 64 or 256, with the least memory
KEPT_UP_TO_TOKENS = 1_024


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    form: AttentionForm,
    *,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
    keep_weights: bool = False,
) -> torch.Tensor:
    """Softmax attention of every document with itself, or what `form` says of it.

    `query` is [1, heads, tokens, head_size]; `key` and `value` are [1, key_heads, tokens, head_size], where heads is a
    multiple of key_heads (grouped queries, Ainslie et al. 2023, arXiv:2305.13245). `bounds` are the boundaries of the
    documents, from 0 to `tokens`. `sinks` [heads] are one more score of every query, whose weight goes to no value
    (Xiao et al. 2023, arXiv:2309.17453). Weights are dropped by the documents' numbers in the data, where
    `known_documents` holds, else by their places in the row. Returns [1, tokens, heads, head_size] in the dtype of
    `value`; under autocast all inputs are cast to its dtype first.

    `keep_weights` saves the weights of documents of up to 1,024 tokens for the backward pass, in the dtype of `value`:
    faster, for at most 1 KiB per head and token in 16 bits where causal, else twice that.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    # the gradient through a cap needs the capped scores, which are not kept
    kept_up_to = KEPT_UP_TO_TOKENS if keep_weights and form.softcap is None and torch.is_grad_enabled() else 0
    return _DocumentAttention.apply(query, key, value, sinks, bounds, form, dropout, kept_up_to)


class _DocumentAttention(AutogradFunction):
    # autocast stays on inside a Function, and would compute the fp32 scores in 16 bits
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, query, key, value, sinks, bounds, form, dropout, kept_up_to) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.bounds, ctx.form = bounds, form
        ctx.drop = drop = _WeightDropout(dropout, len(bounds) - 1)
        output = value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        by_head = output.transpose(1, 2)[0]
        ctx.kept_up_to, ctx.kept = kept_up_to, []  # weights by block, of short documents only
        for number, document in _spans(bounds):
            q, k, v = (t[0, :, document].contiguous() for t in (query, key, value))
            lines = drop.line_keys(number, q)
            scores = _Scores(q, k, v.dtype, form, sinks)
            keeps = q.shape[1] <= kept_up_to
            for rows, keys in form.blocks(q.shape[1], QUERIES_PER_BLOCK):
                weights = scores.softmax(rows, keys, in_own_memory=keeps)
                if keeps:
                    ctx.kept.append(weights)
                product = torch.bmm(drop(weights, drop.mask(weights, lines, rows, keys)), v[:, keys])
                here = slice(document.start + rows.start, document.start + rows.stop)
                by_head[:, here] = product.view(q.shape[0], -1, v.shape[2])
        return output

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        query, key, value, sinks = ctx.saved_tensors
        form, grad_by_head = ctx.form, grad.transpose(1, 2)
        grad_query, grad_key, grad_value = (_empty_by_token(t) for t in (query, key, value))
        grad_sinks = None if sinks is None else torch.zeros_like(_in_fp32(sinks))
        drop, kept = ctx.drop, iter(ctx.kept)
        for number, document in _spans(ctx.bounds):
            q, k, v, upstream = (t[0, :, document].contiguous() for t in (query, key, value, grad_by_head))
            lines = drop.line_keys(number, q)
            scores = None if q.shape[1] <= ctx.kept_up_to else _Scores(q, k, v.dtype, form, sinks)
            gradients = Workspace()
            key_sum, value_sum = torch.zeros_like(_in_fp32(k)), torch.zeros_like(_in_fp32(v))
            for rows, keys in form.blocks(q.shape[1], QUERIES_PER_BLOCK):
                weights = next(kept) if scores is None else scores.softmax(rows, keys)
                mask = drop.mask(weights, lines, rows, keys)
                output_grad = _by_key_head(upstream, rows, len(k))
                value_sum[:, keys] += torch.bmm(drop(weights, mask).transpose(1, 2), output_grad)
                buffer = gradients.empty(weights.shape, weights.dtype)
                weight_grad = drop(torch.bmm(output_grad, v[:, keys].contiguous().transpose(1, 2), out=buffer), mask)
                if grad_sinks is not None:
                    grad_sinks += _sink_gradient(weight_grad, weights).view(len(q), -1).sum(1)
                score_grad = softmax_backward(weight_grad, weights, -1, weights.dtype)
                if scores is not None and form.softcap is not None:
                    score_grad = (score_grad * scores.slope()).to(weights.dtype)
                query_grad = torch.bmm(score_grad, k[:, keys]).view(len(q), -1, q.shape[2])
                here = slice(document.start + rows.start, document.start + rows.stop)
                grad_query[0, :, here] = query_grad.mul_(form.scale)
                key_sum[:, keys] += torch.bmm(score_grad.transpose(1, 2), _by_key_head(q, rows, len(k)))
            grad_key[0, :, document] = key_sum.mul_(form.scale)
            grad_value[0, :, document] = value_sum
        return grad_query, grad_key, grad_value, grad_sinks, None, None, None, None


class _WeightDropout:
    """Dropout of the attention weights of one call; the backward pass computes its masks again."""

    def __init__(self, p: float, documents: int) -> None:
        self.threshold, self.scale = quantised_drop(p)
        self.keys = draw_document_keys(documents) if self.threshold else None

    def line_keys(self, document: int, queries: torch.Tensor) -> np.ndarray | None:
        """The keys of a document's weights, uint64 [heads, tokens], from its queries [heads, tokens, head_size]."""
        if self.keys is None:
            return None
        return index_keys(index_keys(self.keys[document], queries.shape[0]), queries.shape[1])

    def mask(self, weights: torch.Tensor, lines: np.ndarray | None, rows: slice, keys: slice) -> torch.Tensor | None:
        """The mask of a block of weights [key_heads, group * rows, keys]."""
        if lines is None:
            return None
        kept = draw_kept(lines[:, rows].reshape(-1), keys.stop, self.threshold)  # counted from the document's first key
        return as_mask(kept[:, keys.start :]).view(weights.shape)

    def __call__(self, weights: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return weights if mask is None else masked(weights, mask).mul_(self.scale)


def _spans(bounds: list[int]) -> Iterator[tuple[int, slice]]:
    for number, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            yield number, slice(start, stop)


def _by_key_head(tensor: torch.Tensor, rows: slice, key_heads: int) -> torch.Tensor:
    """Rows of [heads, tokens, size] as [key_heads, group * rows, size]: one product per key head."""
    return tensor[:, rows].reshape(key_heads, -1, tensor.shape[2])


def _sink_gradient(weight_grad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The gradient of each query's sink, [key_heads, group * rows]: it has what the weights lack to a sum of 1."""
    grads, shares = _in_fp32(weight_grad), _in_fp32(weights)
    return (shares.sum(-1) - 1) * (grads * shares).sum(-1)


def _in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _empty_by_token(like: torch.Tensor) -> torch.Tensor:
    """Uninitialised [1, heads, tokens, size] in the memory order of the projections, which saves a copy there."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


class _Scores:
    """Attention weights of one document, a block of queries at a time."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        dtype: torch.dtype,
        form: AttentionForm,
        sinks: torch.Tensor | None,
    ) -> None:
        # fp32 scores: rounded to bf16, a score of 20 would be off by up to 0.06
        self.queries = _in_fp32(query)
        self.keys = _in_fp32(key.transpose(1, 2).contiguous())
        self.dtype, self.form = dtype, form
        self.sinks = None if sinks is None else _in_fp32(sinks.detach()).to(self.queries.dtype)
        # bf16 values may use bf16 hardware: their products are exact, and are summed in fp32
        self.precision = _bf16_products if query.dtype == torch.bfloat16 else contextlib.nullcontext
        side = min(QUERIES_PER_BLOCK, query.shape[1])
        self.future = torch.full((side, side), -torch.inf, dtype=self.queries.dtype).triu_(1)
        self.scores, self.weights, self.tangents = Workspace(), Workspace(), Workspace()
        self.tanh: torch.Tensor | None = None  # of the last block's scores divided by the cap

    def softmax(self, rows: slice, keys: slice, *, in_own_memory: bool = False) -> torch.Tensor:
        """Weights [key_heads, group * rows, keys] of a block; the next block overwrites them unless `in_own_memory`."""
        queries, count = _by_key_head(self.queries, rows, len(self.keys)), rows.stop - rows.start
        scores = self.scores.empty((*queries.shape[:2], keys.stop - keys.start), queries.dtype)
        with self.precision():
            torch.bmm(queries, self.keys[:, :, keys], out=scores)
        scores.mul_(self.form.scale)
        if (cap := self.form.softcap) is not None:
            self.tanh = torch.tanh(scores / cap, out=self.tangents.empty(scores.shape, scores.dtype))
            torch.mul(self.tanh, cap, out=scores)
        by_query = scores.view(len(scores), -1, count, scores.shape[2])
        if self.form.causal and self.form.window is None:
            by_query[..., rows.start :] += self.future[:count, :count]
        elif (hidden := self.form.hidden(rows, keys)) is not None:
            by_query.masked_fill_(hidden, -torch.inf)
        if self.sinks is None:
            torch.softmax(scores, dim=-1, out=scores)
        else:
            sinks = self.sinks.view(len(scores), -1, 1, 1)
            total = torch.logaddexp(by_query.logsumexp(-1, keepdim=True), sinks)
            by_query.sub_(total).exp_()
        if in_own_memory:
            return scores.to(self.dtype, copy=True)
        return scores if scores.dtype == self.dtype else self.weights.empty(scores.shape, self.dtype).copy_(scores)

    def slope(self) -> torch.Tensor:
        """The derivative of the capped scores by the scores, of the block that `softmax` computed last."""
        assert self.tanh is not None, "softmax comes first"
        return 1 - self.tanh.square()


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Within it oneDNN may round the inputs of fp32 products to bf16, and does on processors with bf16 instructions."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  (missing in torch's stubs)
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
