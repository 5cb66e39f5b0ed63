"""One process of a launch finds its device and its backend, with or without a GPU, by the same command.

The workarounds for accelerate 1.15 stand here, so that they can be dropped together:
- without a GPU the backend must be named before anything else makes a state: DeepSpeed would look for NCCL, and two
  processes of a MULTI_GPU configuration would each train alone without a word;
- accelerate has no FSDP on CPU unless it believes in MULTI_GPU.
"""

import os
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


@dataclass(frozen=True)
class Process:
    """Where this process stands in its launch."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    deepspeed: bool
    fsdp: bool

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def use_cpu(self) -> bool:
        """TrainingArguments' use_cpu: it silently drops DeepSpeed and FSDP, so it is said for plain and DDP only."""
        return self.device.type == "cpu" and not (self.deepspeed or self.fsdp)


def start_process() -> Process:
    """Make the one process group that everything else shares. Call it before TrainingArguments are made."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which else looks for one and warns
    if torch.cuda.is_available():
        state = PartialState()
    elif deepspeed:
        state = PartialState(backend="gloo")
    else:
        state = PartialState(cpu=True, backend="gloo") if world_size > 1 else PartialState(cpu=True)
        if fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Process(
        rank=state.process_index,
        world_size=state.num_processes,
        local_rank=state.local_process_index,
        device=torch.device(state.device),  # type: ignore[arg-type]
        deepspeed=deepspeed,
        fsdp=fsdp,
    )
