"""The processes of an evaluation: which rows each one evaluates, and how the results are gathered.

An evaluation needs no engine: every process holds the whole model and evaluates its share of the rows, so it runs under
any accelerate configuration (DDP, ZeRO-1 and 2, FSDP2). A process without rows waits for the others. Only ZeRO-3 shards
a language model: each rank holds a part of the weights, every forward gathers them from all ranks, so all of them run
the same number of forwards, and a rank without a batch runs an empty one.

As in training a rank that hangs, falls silent or is gone is named with its host and what it did last, and each of
several ranks has a log.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from isotune.compat.deepspeed import disable_shm_transport
from isotune.distributed.device import choose_device
from isotune.distributed.rank_log import rank_log
from isotune.distributed.rendezvous import rendezvous
from isotune.distributed.watchdog import DEFAULT_TIMEOUT_SECONDS, Watchdog
from isotune.io.errors import RunFault, UserError, shown
from isotune.io.reading import read_json_object
from isotune.io.run_files import or_refuse
from isotune.io.shipped import ROOT
from isotune.models.log_control import quiet_libraries

T = TypeVar("T")

ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
# Ranks wait for the slowest one, which may have much more to do. One that hangs is the watchdog's, after ddp_timeout.
GATHER_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process in the launch."""

    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog = field(default_factory=Watchdog, repr=False, compare=False)  # told of every batch

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """The indices in `costs` of the items of this process, in order.

        The most expensive item goes first, each to the process with the lowest load so far (Graham 1969), so loads
        differ by at most one item. Every process computes the same shares without communication.
        """
        loads, own = [0.0] * self.world_size, []
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            rank = loads.index(min(loads))
            loads[rank] += costs[item]
            if rank == self.rank:
                own.append(item)
        return sorted(own)

    def gather(self, values: Mapping[int, T], count: int | None = None) -> dict[int, T]:
        """The values of all processes by row number, in the order of the rows, the same on every process.

        They are pickled between the processes; one may have none. `count` is the number of rows, numbered from 0. A row
        from two processes, or from none, is a RunFault.
        """
        self.watchdog.progress("the gathering of the rows")
        shares = gather_object([dict(values)]) if self.world_size > 1 else [dict(values)]
        self.watchdog.enter("the work on the gathered rows")
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

    @contextlib.contextmanager
    def supervised(self, log: Path | None) -> Iterator[None]:
        """Hold it around the work: errors and stops are explained, and `log`-N.log is the log of rank N of several.

        None where nothing is written.
        """
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.watchdog.explaining_stops())
                if log is not None and self.world_size > 1:
                    with contextlib.suppress(OSError):  # a log ends no evaluation
                        log.parent.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(rank_log(Path(f"{log}-{self.rank}.log"), self.rank, self.world_size))
                yield
        finally:
            self.watchdog.stop()


def start_ranks(*, ddp_timeout: float = DEFAULT_TIMEOUT_SECONDS, rendezvous_timeout: float | None = None) -> Ranks:
    """Join the processes of the launch, on the GPU where there is one, else on the CPU over gloo.

    Call it before a model is loaded. The launcher's DeepSpeed or FSDP configuration is ignored. From then on a rank
    that falls silent or is gone is named, and all end, after `ddp_timeout` seconds. They have `rendezvous_timeout`
    seconds to reach each other; None: see `isotune.distributed.rendezvous`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "WORLD_SIZE" not in os.environ:
        what = "srun started several tasks that know nothing of each other, and each would evaluate everything"
        raise UserError(f"{what}: start one `accelerate launch` on each node")
    for engine in ENGINES:
        os.environ.pop(engine, None)
    launched = "LOCAL_RANK" in os.environ
    options: dict[str, Any] = {"timeout": GATHER_TIMEOUT} if launched else {}
    if choose_device(processes=world_size) == "cpu":
        # accelerate 1.15 otherwise looks for NCCL, or starts each process as the only one
        options |= {"cpu": True, **({"backend": "gloo"} if launched else {})}
    with rendezvous(rendezvous_timeout):
        state = PartialState(**options)
    watchdog = Watchdog(ddp_timeout)
    watchdog.start()
    watchdog.enter("the loading of the model and the data")
    if state.num_processes != world_size:
        raise RunFault(f"the launcher started {world_size} processes, and accelerate sees {state.num_processes}")
    device: Any = state.device
    return Ranks(state.process_index, state.num_processes, torch.device(device), watchdog)


@dataclass(frozen=True)
class Shards:
    """ZeRO-3 as the launch configures it; `zero` is the section zero_optimization of its DeepSpeed configuration."""

    zero: dict[str, Any]

    def announce(self, dtype: torch.dtype) -> Any:
        """Shard models of this dtype that are loaded from here on, as long as the returned object is referenced."""
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        return HfDeepSpeedConfig(self._config(dtype))

    def spread(self, model: Any) -> Any:
        """The ZeRO-3 engine of a model, which is sharded where it is not yet."""
        import deepspeed

        with quiet_libraries():
            engine, *_ = deepspeed.initialize(model=model, config=self._config(model.dtype))
        engine.eval()
        return engine

    def _config(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed 0.19 requires it for inference too
            "zero_optimization": {key: value for key, value in self.zero.items() if key != "offload_optimizer"},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "steps_per_print": sys.maxsize,
        }


def read_shards() -> Shards | None:
    """The ZeRO-3 configuration of this launch, None without one or on one process; call it before `start_ranks`."""
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not uses_deepspeed or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    config_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if config_file == "none":
        zero: dict[str, Any] = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    else:
        candidates = (Path(config_file), ROOT / config_file)
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise UserError(f"deepspeed_config_file '{config_file}' does not exist")
        config = or_refuse(read_json_object, file, f"deepspeed_config_file {file} cannot be read")
        zero = config.get("zero_optimization") or {}
        if not isinstance(zero, dict):
            raise UserError(f"{file}: zero_optimization is {shown(zero)}: it takes a section of keys")
    if zero.get("stage", 0) != 3:
        return None
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which otherwise searches for one and warns
        disable_shm_transport()
    return Shards(zero)
