"""The Triton kernel of the loss head. Importing it needs triton, which comes with torch for CUDA."""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8  # logits that a program holds at a time


@triton.jit
def _changed(row, bias, column, inside, factor, cap):
    # fp32: the logits as the model changes them, and -inf outside of the row
    x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    x *= factor
    if cap is not None:
        x = cap * (2.0 / (1.0 + tl.exp(x * (-2.0 / cap))) - 1.0)  # cap x tanh(x / cap)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _kernel(
    logits, targets, bias, losses, vocabulary, factor, cap, scale, with_gradient: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    # a program for each position: the sum of exp beside the largest logit so far, then the gradient over the logits
    line = tl.program_id(0).to(tl.int64)
    row, target = logits + line * vocabulary, tl.load(targets + line)
    chosen = _changed(row, bias, target, target < vocabulary, factor, cap)
    largest, total = -3.0e38, 0.0  # finite, because -inf less -inf is no number
    for start in range(0, vocabulary, block):
        column = start + tl.arange(0, block)
        x = _changed(row, bias, column, column < vocabulary, factor, cap)
        before = largest
        largest = tl.maximum(before, tl.max(x, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), axis=0)
    tl.store(losses + line, (largest - chosen) + tl.log(total))
    if with_gradient:
        for start in range(0, vocabulary, block):
            column = start + tl.arange(0, block)
            x = _changed(row, bias, column, column < vocabulary, factor, cap)
            gradient = tl.exp(x - largest) / total - tl.where(column == target, 1.0, 0.0)
            if cap is not None:
                gradient *= 1.0 - (x / cap) * (x / cap)
            gradient *= factor * scale
            tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=column < vocabulary)


def run(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    losses: torch.Tensor,
    factor: float,
    cap: float | None,
    scale: float,
    with_gradient: bool,
) -> None:
    """Write the loss of each of the contiguous `logits` [positions, vocabulary] into `losses`, fp32 [positions].

    The loss is that of `targets`, int64 [positions], under cap x tanh(factor x (logits + bias) / cap), or without a cap
    factor x (logits + bias). `with_gradient` the logits become `scale` times its gradient with respect to themselves.
    """
    kernel: Any = _kernel
    grid = (len(targets),)
    kernel[grid](
        logits, targets, bias, losses, logits.shape[1], factor, cap, scale, with_gradient, BLOCK, num_warps=WARPS
    )
