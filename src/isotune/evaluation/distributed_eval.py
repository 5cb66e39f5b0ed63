"""The processes of an evaluation: which rows each one evaluates, and how the results are gathered.

An evaluation needs no engine: every process holds the whole model and evaluates its share of the rows, so it runs under
any accelerate configuration, DeepSpeed and FSDP included. A process without rows waits for the others.
"""

import heapq
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from isotune.io.errors import RunFault, UserError

T = TypeVar("T")

ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
GATHER_TIMEOUT = timedelta(hours=12)  # for the slowest rank; the launcher ends the other ranks when one dies


@dataclass(frozen=True)
class Ranks:
    """The rank of this process in the launch."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """The indices in `costs` of the items of this process, in order.

        The most expensive item goes first, each to the process with the lowest load so far (Graham 1969), so loads
        differ by at most one item. Every process computes the same shares without communication.
        """
        loads = [(0.0, rank) for rank in range(self.world_size)]
        own = []
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + costs[item], rank))
            if rank == self.rank:
                own.append(item)
        return sorted(own)

    def gather(self, values: Mapping[int, T], count: int | None = None) -> dict[int, T]:
        """The values of all processes by row number, in the order of the rows, the same on every process.

        They are pickled between the processes; one may have none. `count` is the number of rows, numbered from 0.

        Raises:
            RunFault: a row came from two processes, or from none.
        """
        shares = gather_object([dict(values)]) if self.world_size > 1 else [dict(values)]
        if len(shares) != self.world_size:
            raise RunFault(f"{len(shares)} processes of {self.world_size} sent their rows")
        gathered: dict[int, T] = {}
        for share in shares:
            duplicates = gathered.keys() & share.keys()
            if duplicates:
                raise RunFault(f"row {min(duplicates)} came from two processes")
            gathered |= share
        if count is not None and sorted(gathered) != list(range(count)):
            missing = sorted(set(range(count)) - gathered.keys())
            fault = f"row {missing[0]} came from no process" if missing else f"rows beyond the {count} that there are"
            raise RunFault(f"{len(gathered)} rows of {count} were evaluated: {fault}")
        return dict(sorted(gathered.items()))


def start_ranks() -> Ranks:
    """Join the processes of the launch, on the GPU where there is one, else on the CPU over gloo.

    Call it before a model is loaded. The launcher's DeepSpeed or FSDP configuration is ignored.

    Raises:
        UserError: srun started several tasks without a rendezvous.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "srun started several tasks that know nothing of each other, and each would evaluate everything: start one "
            "`accelerate launch` on each node"
        )
    for engine in ENGINES:
        os.environ.pop(engine, None)
    launched = "LOCAL_RANK" in os.environ
    options: dict[str, Any] = {"timeout": GATHER_TIMEOUT} if launched else {}
    if not torch.cuda.is_available():
        # accelerate 1.15 otherwise looks for NCCL, or starts each process as the only one
        options |= {"cpu": True, **({"backend": "gloo"} if launched else {})}
    state = PartialState(**options)
    if state.num_processes != world_size:
        raise RunFault(f"the launcher started {world_size} processes, and accelerate sees {state.num_processes}")
    device: Any = state.device
    return Ranks(state.process_index, state.num_processes, torch.device(device))
