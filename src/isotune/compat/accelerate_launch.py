"""accelerate 1.15: its launcher's options, and FSDP on CPUs."""

from accelerate import PartialState
from accelerate.utils import DistributedType


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
