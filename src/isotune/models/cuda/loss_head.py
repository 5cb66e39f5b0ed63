"""The loss head on a GPU: products, and a kernel that replaces thousands of positions' logits by their gradient.

Every launch costs the host some microseconds, so the chunks are larger than a CPU's. Beside the logits in the type of
the products, nothing of their size exists. Sums over positions have a fixed order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from isotune.compat.torch import product_into
from isotune.models.cuda.triton_driver import triton_runs

FEWEST_POSITIONS, MOST_POSITIONS = 2048, 4096
LOGITS_BYTES = 2**29  # of a chunk, unless the vocabulary is too large for it
TILE = 256  # products are fastest in whole tiles


def triton_kernel(device: torch.device) -> Callable[..., None] | None:
    """`run` of the Triton kernel; None on another device, or where Triton cannot run."""
    if device.type != "cuda" or not triton_runs():
        return None
    from isotune.models.cuda.triton_loss import run

    return run


def positions_per_chunk(vocabulary: int, dtype: torch.dtype) -> int:
    """How many positions have their logits in memory together."""
    fitting = LOGITS_BYTES // (vocabulary * dtype.itemsize) // TILE * TILE
    return min(max(fitting, FEWEST_POSITIONS), MOST_POSITIONS)


def loss_and_gradients(
    run: Callable[..., None],
    states: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: Any,
    scale: float,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The summed loss, and the gradients of states, head and bias where they are needed; all in fp32.

    `states` [targets, size] and `head` [vocabulary, size] are of one type; `run` is the kernel, `transform` a
    LogitsTransform. Gradients of logits are multiplied by `scale` before they are rounded.
    """
    losses = states.new_empty(len(targets), dtype=torch.float32)
    of_states = torch.empty_like(states, dtype=torch.float32) if needed[0] else None
    like_head = torch.empty_like if len(targets) else torch.zeros_like  # the first product writes all of it
    of_head = like_head(head, dtype=torch.float32) if needed[1] else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None
    step = positions_per_chunk(len(head), states.dtype)
    buffer = states.new_empty(min(step, len(targets)), len(head))
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        logits = torch.mm(states[rows], head.t(), out=buffer[: len(targets[rows])])
        run(logits, targets[rows], bias, losses[rows], transform.scale, transform.cap, scale, any(needed))
        if of_states is not None:
            product_into(of_states[rows], logits, head, add=False)
        if of_head is not None:
            product_into(of_head, logits.t(), states[rows], add=start > 0)
        if of_bias is not None:  # of the same rounded numbers as the head's
            of_bias += logits.sum(0, dtype=torch.float32)
    gradients = [of_states, of_head, of_bias]
    for gradient in gradients:
        if gradient is not None and scale != 1.0:
            gradient.div_(scale)
    return losses.sum(), gradients
