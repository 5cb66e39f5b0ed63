"""Read from accelerate's and DeepSpeed's files how a run would be launched, without starting a process."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import offloaded, read_deepspeed_config, stage_of
from isotune.distributed.launch_validation import check_keys, check_precision, request_of
from isotune.io.errors import Complain, did_you_mean

PLAIN, DDP, DEEPSPEED, FSDP = "plain", "DDP", "DeepSpeed", "FSDP"
SHIPPED = ("plain", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
_SHIPPED_BUCKET_ELEMENTS = 50_000_000  # reduce_bucket_size of ds_configs/
# the environment variables in which accelerate passes the keys of `deepspeed_config` to its ranks
_DEEPSPEED_VARIABLES = {
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}


@dataclass(frozen=True)
class Launch:
    """An engine on a number of processes.

    Attributes:
        engine: plain, DDP, DeepSpeed or FSDP.
        world_size: number of processes over all nodes.
        name: the configuration file, or a description of it.
        deepspeed_config: the complete configuration; None under other engines.
        offload: parts in host memory: `optimizer`, `param`.
    """

    engine: str
    world_size: int
    name: str = "no launch configuration"
    deepspeed_config: Mapping[str, Any] | None = None
    offload: tuple[str, ...] = ()

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage, None without DeepSpeed."""
        return stage_of(self.deepspeed_config) if self.engine == DEEPSPEED else None

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds only a shard of the weights."""
        return self.engine == FSDP or self.zero_stage == 3

    def casts_weights(self, recipe: RunRecipe) -> bool:
        """Whether the engine casts the weights to the recipe's 16-bit type, instead of using autocast."""
        return self.engine == DEEPSPEED and bool(recipe.bf16 or recipe.fp16)

    @property
    def in_words(self) -> str:
        """`ZeRO-2 on 4 processes`."""
        engine = {DEEPSPEED: f"ZeRO-{self.zero_stage}", FSDP: "FSDP2"}.get(self.engine, self.engine)
        offload = f" with {' and '.join(self.offload)} in host memory" if self.offload else ""
        return f"{engine}{offload} on {self.world_size} process{'es' if self.world_size > 1 else ''}"


def shipped_launch(name: str, world_size: int) -> Launch:
    """The launch of a file in accelerate_configs/ by its name in SHIPPED, on that many processes."""
    if name in ("plain", "ddp"):
        return Launch(DDP if world_size > 1 else PLAIN, world_size)
    file = f"accelerate_configs/{name}.yaml"
    if name == "fsdp2":
        return Launch(FSDP, world_size, file)
    stage = int(name.removeprefix("zero")[0])
    config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": _SHIPPED_BUCKET_ELEMENTS}}
    offload = ("optimizer", "param") if name.endswith("_offload") else ()
    return Launch(DEEPSPEED, world_size, file, config, offload)


def read_launch(file: str | None, world_size: int | None, recipe: RunRecipe, complain: Complain) -> Launch:
    """The launch that `accelerate launch --config_file FILE --num_processes N` would start for a recipe.

    Args:
        file: accelerate's YAML; None means plain training, or DDP for a `world_size` above 1.
        world_size: overrides the file.
        recipe: fills DeepSpeed's `auto` values.
        complain: takes each problem of the files, and each contradiction with the recipe.
    """
    if file is None:
        return shipped_launch("ddp", world_size or 1)
    keys = _read(file, complain)
    known = set(_accelerate_keys())
    for key in keys:
        if key not in known:
            complain(f"{file}: accelerate has no key '{key}'{did_you_mean(key, sorted(known))}")
    request = request_of(["--config_file", file, "script.py"])
    if not keys or request is None:
        return Launch(DDP if (world_size or 1) > 1 else PLAIN, world_size or 1, file)
    check_keys(request, complain)
    check_precision(file, recipe, str(keys.get("mixed_precision") or "no").lower(), complain)
    if request.on_cpu:
        complain(f"{file}: use_cpu: true and MULTI_CPU start one plain process: leave them out; the script finds a CPU")
    count = world_size or request.processes or 1
    engine = request.engine
    if engine == PLAIN and count > 1:
        complain(f"{file} is for one process, and num_processes is {count}: take accelerate_configs/ddp.yaml")
    if engine == DDP and count == 1:
        engine = PLAIN
    if engine == DEEPSPEED:
        config = _deepspeed_config(keys.get("deepspeed_config") or {}, recipe, count, file, complain)
        return Launch(engine, count, file, config, tuple(offloaded(config)))
    offload = (keys.get("fsdp_config") or {}).get("fsdp_offload_params") is True
    return Launch(engine, count, file, None, ("param", "optimizer") if engine == FSDP and offload else ())


def _deepspeed_config(
    section: Mapping[str, Any], recipe: RunRecipe, world_size: int, file: str, complain: Complain
) -> dict[str, Any]:
    environment = {name: str(section[key]) for key, name in _DEEPSPEED_VARIABLES.items() if key in section}
    environment["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(section)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU and warn
    return read_deepspeed_config(recipe, world_size, environment, file, complain)


def _read(file: str, complain: Complain) -> dict[str, Any]:
    try:
        keys = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        complain(f"--accelerate_config {file} cannot be read: {error.strerror}")
        return {}
    except yaml.YAMLError as error:
        complain(f"{file} is not YAML: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(keys, dict):
        complain(f"{file} has no keys of accelerate's")
        return {}
    return keys


def _accelerate_keys() -> list[str]:
    from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig

    return [field.name for config in (ClusterConfig, SageMakerConfig) for field in fields(config)]
