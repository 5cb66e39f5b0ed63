"""accelerate 1.15: what it has no public way for, or does wrongly."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def run_fp16_on_cpu(accelerator: Any) -> None:
    """Let fp16 on CPU run in fp16: accelerate 1.15 computes in fp32 there and says nothing."""
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")


def reduce_fsdp_in_fp32(accelerator: Any) -> None:
    """Let FSDP2 in 16 bits sum gradients in fp32 and leave outputs as they are; call it before `prepare`.

    accelerate 1.15's policy rounds the summed loss to 16 bits, and with it the factor on every gradient, and adds up
    and reduces the gradients of microbatches in 16 bits.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
        plugin.mixed_precision_policy = policy


def let_scaler_check_before_step(optimizer: Any) -> None:
    """Make fp16's scaler look for an overflow before each step, fused optimizers too.

    A fused optimizer looks for itself, in its step; accelerate 1.15 then takes the step for done, so the schedule
    moves on and nothing counts the skipped update. `optimizer` is torch's, without accelerate's wrapper.
    """
    optimizer._step_supports_amp_scaling = False


def launcher_options(group: str) -> list[str]:
    """The names of the options in a group of `accelerate launch`, such as `FSDP Arguments`.

    Private because argparse has no public list of a parser's groups or of a group's options.
    """
    from accelerate.commands.launch import launch_command_parser

    groups = {options.title: options for options in launch_command_parser()._action_groups}
    return [action.dest for action in groups[group]._group_actions]


def allow_fsdp_on_cpu() -> None:
    """Report a process group of CPUs as MULTI_GPU: accelerate prepares FSDP under that type only.

    Private because PartialState has no setter for its distributed type.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
