"""The few numbers that ranks exchange in a step, summed so that their order does not matter."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from isotune.distributed.launch import Process
from isotune.io.errors import RunFault, UserError

T = TypeVar("T")


def gather_by_number(values: dict[int, torch.Tensor], count: int, device: torch.device) -> list[float]:
    """Every microbatch's number from whichever rank has it.

    Args:
        values: scalars of this rank by microbatch number, weight-zero passes left out.
        count: microbatches in the step.
        device: of the collective.

    Returns:
        `count` floats, the same on every rank; each entry came from one rank and was added to zeros only, so the
        list does not depend on the number of ranks.
    """
    table = torch.zeros(count, dtype=torch.float64, device=device)
    if values:
        numbers = torch.tensor(list(values), device=device)
        table[numbers] = torch.stack([v.detach().double().reshape(()) for v in values.values()]).to(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(table)
    return table.tolist()


def gather_vectors(values: dict[int, torch.Tensor], count: int, size: int, device: torch.device) -> torch.Tensor:
    """`gather_by_number` of vectors: float64 [count, size] on the CPU, the same on every rank.

    Args:
        values: [size] by number, each number on one rank only; a row that nobody has is zero.
    """
    table = torch.zeros(count, size, dtype=torch.float64, device=device)
    if values:
        numbers = torch.tensor(list(values), device=device)
        table[numbers] = torch.stack([v.detach().double() for v in values.values()]).to(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(table)
    return table.cpu()


def ordered_sum(values: list[float]) -> float:
    """The sum, correctly rounded, hence the same in any order; NaN and infinity pass through.

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
