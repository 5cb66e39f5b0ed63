"""One process of a launch finds its device and its backend, with or without a GPU, by the same command.

The workarounds for accelerate 1.15 stand here, so that they can be dropped together:
- without a GPU the backend must be named before anything else makes a state: DeepSpeed would look for NCCL, and two
  processes of a MULTI_GPU configuration would each train alone without a word;
- accelerate has no FSDP on CPU unless it believes in MULTI_GPU.
"""

import os
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import INLINE, read_deepspeed_config, stage_of
from isotune.distributed.deepspeed_setup import announce_zero3, let_gloo_carry
from isotune.distributed.launch_validation import check_launch, read_request
from isotune.distributed.rendezvous import rendezvous
from isotune.io.errors import UserError

AFTER_THE_WATCHDOG_SECONDS = 60


@dataclass(frozen=True)
class Process:
    """Where this process stands in its launch, and what was asked of the engine.

    Attributes:
        deepspeed_config: complete, with nothing left to fill in; None under every other engine.
        keep_alive: what transformers only holds weakly, and needs while a model is made.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    deepspeed: bool
    fsdp: bool
    deepspeed_config: dict[str, Any] | None = None
    keep_alive: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def use_cpu(self) -> bool:
        """TrainingArguments' use_cpu: it silently drops DeepSpeed and FSDP, so it is said for plain and DDP only."""
        return self.device.type == "cpu" and not (self.deepspeed or self.fsdp)

    def loading_device(self, recipe: RunRecipe) -> torch.device:
        """Where a model is made: in host memory where the engine puts only shares of it on the device.

        4-bit weights are made where they will lie, whatever the engine.
        """
        return torch.device("cpu") if self.shards_weights and recipe.tune != "qlora" else self.device

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage that was asked, None without DeepSpeed."""
        return stage_of(self.deepspeed_config) if self.deepspeed else None

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only its share of the weights."""
        return self.fsdp or self.zero_stage == 3


def start_process(recipe: RunRecipe) -> Process:
    """Make the one process group that everything else shares. Call it before the model and TrainingArguments are made.

    Raises:
        UserError: the launch is not what was asked, or its configuration contradicts the recipe.
        RunFault: the ranks do not find each other; says which, and where they were looked for.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which else looks for one and warns
    request = read_request()
    check_launch(request, recipe)
    if fsdp and on_cpu and world_size == 1:
        raise UserError("FSDP on one CPU process has nothing to shard: say --num_processes 2 or more")
    if deepspeed and on_cpu and recipe.fp16:
        raise UserError("fp16 under DeepSpeed needs a GPU: say bf16: true, or neither, to try it on the CPU")
    config = None
    if deepspeed:
        config = read_deepspeed_config(recipe, world_size, name=request.name if request else INLINE)
    with rendezvous():
        state = _make_state(recipe, world_size, deepspeed=deepspeed, fsdp=fsdp, on_cpu=on_cpu)
    return Process(
        rank=state.process_index,
        world_size=state.num_processes,
        local_rank=state.local_process_index,
        device=torch.device(state.device),  # type: ignore[arg-type]
        deepspeed=deepspeed,
        fsdp=fsdp,
        deepspeed_config=config,
        keep_alive=announce_zero3(config) if config and stage_of(config) == 3 else None,
    )


def _make_state(recipe: RunRecipe, world_size: int, *, deepspeed: bool, fsdp: bool, on_cpu: bool) -> PartialState:
    # the watchdog, which can name the rank that hangs, comes first
    limit: dict[str, Any] = {
        "timeout": timedelta(seconds=recipe.training_arguments["ddp_timeout"] + AFTER_THE_WATCHDOG_SECONDS)
    }
    if not on_cpu:
        return PartialState(**limit) if "LOCAL_RANK" in os.environ else PartialState()
    if deepspeed:
        let_gloo_carry()
        return PartialState(backend="gloo", **limit)
    if world_size == 1:
        return PartialState(cpu=True)
    state = PartialState(cpu=True, backend="gloo", **limit)
    if fsdp:
        # torch 2.13 warns of blocks that return views, lest they be changed in place; OPT's are not
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return state
