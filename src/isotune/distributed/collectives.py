"""Scalars and vectors that ranks exchange in a step, summed so that the order of the ranks does not matter."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from isotune.distributed.launch import Process
from isotune.io.errors import RunFault, UserError

T = TypeVar("T")


def gather_by_number(values: dict[int, torch.Tensor], count: int, device: torch.device) -> list[float]:
    """One scalar of every microbatch, from the rank that has it.

    Args:
        values: this rank's scalars by microbatch number, without microbatches of weight zero.
        count: microbatches in the step.
        device: where the collective runs.

    Returns:
        `count` floats, the same on every rank. Each one comes from one rank and is added to zeros only, so the list
        does not depend on the number of ranks.
    """
    rows = {number: value.reshape(1) for number, value in values.items()}
    return gather_vectors(rows, count, 1, device)[:, 0].tolist()


def gather_vectors(values: dict[int, torch.Tensor], count: int, size: int, device: torch.device) -> torch.Tensor:
    """One vector of every row, from the rank that has it: float64 [count, size] on the CPU, the same on every rank.

    Args:
        values: this rank's vectors, [size] each, by row. No row is on two ranks; a row on none is zero.
    """
    table = torch.zeros(count, size, dtype=torch.float64, device=device)
    if values:
        rows = torch.tensor(list(values), device=device)
        table[rows] = torch.stack([value.detach().double() for value in values.values()]).to(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(table)
    return table.cpu()


def ordered_sum(values: list[float]) -> float:
    """The correctly rounded sum, which is the same in any order; NaN and Inf propagate.

    Source: Shewchuk 1997, through `math.fsum`.
    """
    return math.fsum(values) if all(math.isfinite(v) for v in values) else sum(values)


def call_on_main(process: Process, call: Callable[[], T]) -> T:
    """Call on the main process only; every rank returns its result, or raises its UserError or RunFault."""
    outcome: list[Any] = [None]
    if process.is_main:
        try:
            outcome = [call()]
        except (UserError, RunFault) as error:
            outcome = [error]
    if process.world_size > 1:
        dist.broadcast_object_list(outcome, src=0, device=process.device)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
