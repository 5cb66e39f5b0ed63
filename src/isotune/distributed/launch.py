"""Set up one process of a launch: its device, backend and process group, with or without a GPU, by the same command.

accelerate 1.15 needs two workarounds on a machine without a GPU:
- the backend must be named before anything else creates a PartialState: DeepSpeed would look for NCCL, and two
  processes of a MULTI_GPU configuration would each train alone without an error;
- FSDP needs the distributed type MULTI_GPU (`isotune.compat.accelerate`).
"""

import os
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from isotune.compat.accelerate import allow_fsdp_on_cpu
from isotune.compat.deepspeed import disable_shm_transport
from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import INLINE, read_deepspeed_config, stage_of
from isotune.distributed.launch_validation import check_launch, engine_of, read_request
from isotune.distributed.rendezvous import rendezvous
from isotune.io.errors import UserError

COLLECTIVE_TIMEOUT_MARGIN_SECONDS = 60


@dataclass(frozen=True)
class Process:
    """This process's place in the launch, and the engine that was asked for.

    Attributes:
        deepspeed_config: the complete configuration, without `auto`; None under every other engine.
        keep_alive: transformers' HfDeepSpeedConfig, which transformers holds weakly and needs while a model loads.
    """

    rank: int
    world_size: int
    device: torch.device
    fsdp: bool = False
    deepspeed_config: dict[str, Any] | None = None
    keep_alive: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def deepspeed(self) -> bool:
        """Whether the engine is DeepSpeed."""
        return self.deepspeed_config is not None

    @property
    def use_cpu(self) -> bool:
        """TrainingArguments' use_cpu, for plain and DDP only: it silently drops DeepSpeed and FSDP."""
        return self.device.type == "cpu" and not (self.deepspeed or self.fsdp)

    def loading_device(self, recipe: RunRecipe) -> torch.device:
        """The device that a model loads on: host memory where the engine later puts only shards on the device.

        4-bit weights always load on the training device.
        """
        return torch.device("cpu") if self.shards_weights and recipe.tune != "qlora" else self.device

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage that was asked for; None without DeepSpeed."""
        return stage_of(self.deepspeed_config) if self.deepspeed else None

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds only a shard of the weights."""
        return self.fsdp or self.zero_stage == 3


def start_process(recipe: RunRecipe) -> Process:
    """Create the process group. Call it before the model and TrainingArguments are created.

    Raises:
        UserError: the launch is not what was asked for, or its configuration contradicts the recipe.
        RunFault: the ranks do not reach each other; names the ranks and their addresses.
    """
    world_size, engine = int(os.environ.get("WORLD_SIZE", "1")), engine_of(os.environ)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed's import, which otherwise looks for a GPU and warns
    request = read_request()
    check_launch(request, recipe)
    if engine == "FSDP" and on_cpu and world_size == 1:
        raise UserError("FSDP on one CPU process has nothing to shard: say --num_processes 2 or more")
    if engine == "DeepSpeed" and on_cpu and recipe.fp16:
        raise UserError("fp16 under DeepSpeed needs a GPU: say bf16: true, or neither, to try it on the CPU")
    config = keep_alive = None
    if engine == "DeepSpeed":
        config = read_deepspeed_config(recipe, world_size, name=request.name if request else INLINE)
    with rendezvous():
        state = _make_state(recipe, world_size, engine, on_cpu)
    if stage_of(config) == 3:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        keep_alive = HfDeepSpeedConfig(config)
    device = torch.device(state.device)  # type: ignore[arg-type]  (declared as a device, a string or None)
    return Process(state.process_index, state.num_processes, device, engine == "FSDP", config, keep_alive)


def _make_state(recipe: RunRecipe, world_size: int, engine: str, on_cpu: bool) -> PartialState:
    # longer than the watchdog's, which can name the rank that hangs
    seconds = recipe.training_arguments["ddp_timeout"] + COLLECTIVE_TIMEOUT_MARGIN_SECONDS
    timeout: dict[str, Any] = {"timeout": timedelta(seconds=seconds)}
    if not on_cpu:
        return PartialState(**timeout) if "LOCAL_RANK" in os.environ else PartialState()
    if engine == "DeepSpeed":
        disable_shm_transport()
        return PartialState(backend="gloo", **timeout)
    if world_size == 1:
        return PartialState(cpu=True)
    state = PartialState(cpu=True, backend="gloo", **timeout)
    if engine == "FSDP":
        # torch 2.13 warns that a block's outputs are views, which must not be changed in place; OPT does not do so
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        allow_fsdp_on_cpu()
    return state
