"""accelerate 1.15: what it has no public way for, or does wrongly."""

from typing import Any

import torch


def set_gradient_sync(accelerator: Any, on: bool) -> None:
    """Say whether gradients travel in the backward pass that follows, and whether the optimizer may step.

    accelerate has `no_sync` for the first, and only its own data loaders for the second.
    """
    accelerator.gradient_state._set_sync_gradients(on)


def run_fp16_on_cpu(accelerator: Any) -> None:
    """Let fp16 on CPU run in fp16: accelerate 1.15 computes in fp32 there and says nothing."""
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")


def let_scaler_check_before_step(optimizer: Any) -> None:
    """Make fp16's scaler look for an overflow before each step, fused optimizers too.

    A fused optimizer looks for itself, in its step; accelerate 1.15 then takes the step for done, so the schedule
    moves on and nothing counts the skipped update.

    Args:
        optimizer: torch's, without accelerate's wrapper.
    """
    optimizer._step_supports_amp_scaling = False
