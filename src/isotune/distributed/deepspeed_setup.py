"""What has to be said to DeepSpeed and to transformers before a model is loaded, in training and in evaluation."""

from typing import Any


def let_gloo_carry() -> None:
    """Keep DeepSpeed from compiling its own transport between CPU processes.

    DeepSpeed 0.19 does so at its first start, which asks for a compiler; and a process that is killed meanwhile leaves
    a lock behind (torch's FileBaton) at which every later start of this user waits for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]


def announce_zero3(config: dict[str, Any]) -> Any:
    """Tell transformers of ZeRO-3, so that pretrained weights load in shares; it holds the result only weakly."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)
