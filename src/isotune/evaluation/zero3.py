"""Generation with a model that is sharded by ZeRO-3: each rank holds a part of the weights.

Every forward then gathers weights from all ranks, so all of them run the same number of forwards: in `complete` and
`score_references` a rank without a batch runs an empty one. With every other engine's configuration (DDP, ZeRO-1 and 2,
FSDP2) each process holds the whole model.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isotune.compat.deepspeed import disable_shm_transport
from isotune.io.errors import UserError, first_line
from isotune.models.log_control import quiet_libraries


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
    """The ZeRO-3 configuration of this launch, None without one or on one process; call it before `start_ranks`.

    Raises:
        UserError: the DeepSpeed configuration cannot be read.
    """
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not uses_deepspeed or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    config_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if config_file == "none":
        zero: dict[str, Any] = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    else:
        candidates = (Path(config_file), Path(sys.argv[0]).resolve().parent.parent / config_file)
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise UserError(f"deepspeed_config_file '{config_file}' does not exist")
        try:
            zero = dict(json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {}))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"deepspeed_config_file {file} cannot be read: {first_line(error)}") from error
    if int(zero.get("stage", 0)) != 3:
        return None
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which otherwise searches for one and warns
        disable_shm_transport()
    return Shards(zero)
