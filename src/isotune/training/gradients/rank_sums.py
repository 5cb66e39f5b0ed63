"""The sum of whole gradients over the ranks, in buckets, for engines whose own sum comes too early.

DDP reduces within the last backward; where ranks vote, they sum after it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from isotune.distributed.ranks import several_ranks

BUCKET = 2**22  # elements of small gradients that are summed together


@torch.no_grad()
def drop_gaps(parameters: list[Any], gaps: list[Any]) -> None:
    """After a sum to which `gaps`, of this rank, added zeros: where no rank had a gradient it is None again.

    So the optimizer leaves the parameter alone.
    """
    own = set(map(id, gaps))
    found = torch.tensor([float(id(p) not in own) for p in parameters], device=parameters[0].device)
    if several_ranks():
        dist.all_reduce(found)
    for p, count in zip(parameters, found.tolist(), strict=True):
        p.grad = p.grad if count else None


@torch.no_grad()
def sum_over_ranks(parameters: list[Any]) -> list[Any]:
    """Sum the gradients of `parameters` over the ranks, in place; returns those that have none on this rank.

    They count as zero there, for `drop_gaps` to look at.
    """
    gaps = [p for p in parameters if p.grad is None]
    for p in gaps:
        p.grad = torch.zeros_like(p)
    waiting: tuple[list[torch.Tensor], torch.Tensor, Any] | None = None
    for bucket in _buckets([p.grad for p in parameters]):
        # a large one travels where it lies
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        whole = bucket[0] if alone else torch.cat([gradient.flatten() for gradient in bucket])
        sent = dist.all_reduce(whole, async_op=True)
        if waiting is not None:
            _take_back(*waiting)
        waiting = bucket, whole, sent
    if waiting is not None:
        _take_back(*waiting)
    return gaps


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type, together as large as BUCKET allows."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.numel() > BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def _take_back(bucket: list[torch.Tensor], whole: torch.Tensor, sent: Any) -> None:
    sent.wait()
    if whole is not bucket[0]:
        for gradient, part in zip(bucket, whole.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view(gradient.shape))
