"""What an evaluation knows of processes: which rows are its own, and how all of them come together again.

An evaluation does not need an engine: every process holds the whole model and takes its share of the rows, so any
accelerate configuration serves, a DeepSpeed or FSDP one too, and a process without a row only waits for the others.
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
LONGEST_WAIT = timedelta(hours=12)  # for the slowest rank; the launcher ends the others of a rank that died


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of the launch."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """Which items this process carries out, by their place in `costs`, in order.

        The dearest item goes first, each to the process with the least to do so far (Graham 1969), so loads differ by
        at most one item. Every process comes to the same shares without a word.

        Args:
            costs: of each item (a row, a batch), in any unit.
        """
        loads = [(0.0, rank) for rank in range(self.world_size)]
        mine = []
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + costs[item], rank))
            if rank == self.rank:
                mine.append(item)
        return sorted(mine)

    def gather(self, values: Mapping[int, T], count: int | None = None) -> dict[int, T]:
        """Every process's values by their number, in the order of the numbers, the same on all of them.

        Args:
            values: of this process; it may have none. They travel as objects between processes of one launch.
            count: how many there must be, numbered from 0.

        Raises:
            RunFault: a number came from two processes, or from none.
        """
        shares = gather_object([dict(values)]) if self.world_size > 1 else [dict(values)]
        if len(shares) != self.world_size:
            raise RunFault(f"{len(shares)} processes of {self.world_size} gave their rows")
        found: dict[int, T] = {}
        for share in shares:
            twice = found.keys() & share.keys()
            if twice:
                raise RunFault(f"row {min(twice)} came from two processes")
            found |= share
        if count is not None and sorted(found) != list(range(count)):
            missing = sorted(set(range(count)) - found.keys())
            said = f"row {missing[0]} came from no process" if missing else f"rows beyond the {count} that there are"
            raise RunFault(f"{len(found)} rows of {count} were evaluated: {said}")
        return dict(sorted(found.items()))


def start_ranks() -> Ranks:
    """Join the processes of the launch, on the GPU where there is one, else on the CPU over gloo.

    Call it before a model is loaded. What the launcher's configuration says of DeepSpeed or FSDP is left aside.

    Raises:
        UserError: srun started several tasks that know nothing of each other.
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
    how: dict[str, Any] = {"timeout": LONGEST_WAIT} if launched else {}
    if not torch.cuda.is_available():
        # accelerate 1.15 looks for NCCL, or lets each process believe that it is alone, unless told before all else
        how |= {"cpu": True, **({"backend": "gloo"} if launched else {})}
    state = PartialState(**how)
    if state.num_processes != world_size:
        raise RunFault(f"the launcher started {world_size} processes, and accelerate sees {state.num_processes}")
    return Ranks(state.process_index, state.num_processes, torch.device(state.device))  # type: ignore[arg-type]
