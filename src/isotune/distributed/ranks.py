"""What ranks exchange while they train: numbers, and what the main process found."""

import math
import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from isotune.io.errors import OneSentence, RankFault, as_user_error, first_line

T = TypeVar("T")


def several_ranks() -> bool:
    """Whether this process belongs to a group of more than one rank."""
    return world_size() > 1


def world_size() -> int:
    """Ranks of the group that this process belongs to."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_by_number(values: dict[int, torch.Tensor], count: int, device: torch.device) -> list[float]:
    """One scalar of each of `count` microbatches, from the rank that has it: the same list on every rank.

    Each scalar comes from one rank and is added to zeros only, so the list does not depend on the number of ranks.
    `values` are this rank's by microbatch number, without microbatches of weight zero.
    """
    rows = {number: value.reshape(1) for number, value in values.items()}
    return gather_vectors(rows, count, 1, device)[:, 0].tolist()


def least_of_ranks(number: int, device: torch.device) -> int:
    """The smallest of the ranks' whole numbers."""
    least = torch.tensor(number, device=device)
    if several_ranks():
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def gather_vectors(values: dict[int, torch.Tensor], count: int, size: int, device: torch.device) -> torch.Tensor:
    """One vector of every row, from the rank that has it: float64 [count, size] on the CPU, the same on every rank.

    `values` are this rank's vectors, [size] each, by row. No row is on two ranks; a row on none is zero.
    """
    if device.type == "mps":  # which has no float64, and is one process
        device = torch.device("cpu")
    table = torch.zeros(count, size, dtype=torch.float64, device=device)
    if values:
        rows = torch.tensor(list(values), device=device)
        table[rows] = torch.stack([value.detach().to(device).double() for value in values.values()])
    if several_ranks():
        dist.all_reduce(table)
    return table.cpu()


def add_vectors(values: dict[int, torch.Tensor], count: int, size: int, device: torch.device) -> torch.Tensor:
    """`gather_vectors` of few rows without waiting for the device, where the result stays."""
    if device.type == "mps":  # which has no float64, and is one process
        device = torch.device("cpu")
    nothing = torch.zeros(size, dtype=torch.float64, device=device)
    rows = [values[row].detach().to(device).double() if row in values else nothing for row in range(count)]
    table = torch.stack(rows) if rows else nothing.new_zeros(0, size)
    if several_ranks():
        dist.all_reduce(table)
    return table


def gather_parts(own: dict[int, torch.Tensor], lengths: list[int], device: torch.device) -> list[torch.Tensor]:
    """One tensor [length, ...] of each place of `lengths`, from the rank that has it: the same bits on every rank.

    `own` are this rank's by place, float32, equal in all but their first axis.
    """
    trailing = [tuple(part.shape[1:]) for part in own.values()][:1]
    if several_ranks():
        shapes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, trailing)
        trailing = next(shape for shape in shapes if shape)
    table = torch.zeros(sum(lengths), *trailing[0], device=device)
    parts = list(table.split(lengths))
    for place, part in own.items():
        parts[place].copy_(part.detach())
    if several_ranks():
        dist.all_reduce(table)
    return [part.clone() for part in parts]


def ordered_sum(values: list[float]) -> float:
    """The correctly rounded sum, which is the same in any order (Shewchuk 1997); NaN and Inf propagate."""
    return math.fsum(values) if all(math.isfinite(v) for v in values) else sum(values)


class Rank(Protocol):
    """A process of a launch that trains or evaluates."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        ...

    @property
    def device(self) -> torch.device:
        """Which its collectives take."""
        ...


def call_on_main(rank: Rank, call: Callable[[], T]) -> T:
    """Call on the main process only; every rank returns its result, or raises its error of one sentence.

    An error of the disk becomes one sentence. Of any other the main process raises the error itself, and the others a
    RankFault that names it.
    """
    outcome: list[Any] = [None]
    own: Exception | None = None
    if rank.is_main:
        try:
            outcome = [call()]
        except Exception as error:
            own = as_user_error(error) or error
            where = f"rank 0 on {socket.gethostname()} failed with {type(own).__name__}"
            outcome = [own if isinstance(own, OneSentence) else RankFault(f"{where}: {first_line(own)}")]
    if several_ranks():
        dist.broadcast_object_list(outcome, src=0, device=rank.device)
    if own is not None:
        raise own
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
