"""Generation with a model that no process could hold: under ZeRO-3 each rank keeps its share of the weights.

Every forward pass then gathers weights from all ranks, so all of them make the same number of passes: `complete` and
`score_references` let a rank that has nothing left to do go through the motions. Every other engine's configuration
(DDP, ZeRO-1 and 2, FSDP2) starts processes that hold the whole model each.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from isotune.compat.deepspeed_launch import disable_shm_transport
from isotune.data.sources.hub import first_line
from isotune.evaluation.generation.batched_generation import GenerationModel
from isotune.io.errors import UserError
from isotune.models.log_control import quiet_libraries


@dataclass(frozen=True)
class Shards:
    """ZeRO-3 as the launch asked for it; `zero` is the section zero_optimization of its DeepSpeed configuration."""

    zero: dict[str, Any]

    def announce(self, dtype: torch.dtype) -> Any:
        """Let models that are loaded from here on, with weights of this type, lie in shares; keep what is returned."""
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        return HfDeepSpeedConfig(self._config(dtype))

    def spread(self, speaker: GenerationModel) -> GenerationModel:
        """The same model at work in shares; a model that does not lie in shares yet is split."""
        import deepspeed

        with quiet_libraries():
            engine, *_ = deepspeed.initialize(model=speaker.model, config=self._config(speaker.model.dtype))
        engine.eval()
        return replace(speaker, model=engine.module, sharded=True, engine=engine)

    def _config(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed 0.19 wants one, for inference too
            "zero_optimization": {key: value for key, value in self.zero.items() if key != "offload_optimizer"},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "steps_per_print": sys.maxsize,
        }


def read_shards() -> Shards | None:
    """Whether several processes of this launch were asked to hold a model in shares; ask before `start_ranks`.

    Raises:
        UserError: the DeepSpeed configuration cannot be read.
    """
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not asked or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named == "none":
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        zero: dict[str, Any] = {"stage": stage}
    else:
        file = next((f for f in (Path(named), Path(sys.argv[0]).resolve().parent.parent / named) if f.is_file()), None)
        if file is None:
            raise UserError(f"deepspeed_config_file '{named}' does not exist")
        try:
            zero = dict(json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {}))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"deepspeed_config_file {file} cannot be read: {first_line(error)}") from error
    if int(zero.get("stage", 0)) != 3:
        return None
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which else looks for one and warns
        disable_shm_transport()
    return Shards(zero)
