"""What the launcher was asked for, so that a launch that quietly became another one is refused.

accelerate 1.15 starts one plain process for `--cpu`, for `use_cpu: true` and for a MULTI_CPU configuration, whatever
number of processes and whatever engine was asked, and drops keys that it does not know. Its ranks inherit only what it
made of the request; the request itself stands in the command line of their parent process, which Linux shows.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isotune.config import RunRecipe
from isotune.io.errors import Complain, UserError, refuse
from isotune.io.near_names import did_you_mean

FLAGS_ONLY = {"rdzv_backend": "static", "same_network": False}  # accelerate 1.15 reads these from its flags alone


@dataclass(frozen=True)
class Request:
    """An `accelerate launch` as it was typed.

    Attributes:
        file: the configuration file, as named; None where there is none.
        engine: DDP, DeepSpeed, FSDP or plain.
        processes: in all; None where nothing said a number.
        on_cpu: --cpu, or use_cpu or MULTI_CPU in the file.
        written: the file's keys.
    """

    file: str | None
    engine: str
    processes: int | None
    on_cpu: bool
    written: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file, or words for it."""
        return self.file or "the accelerate configuration"


def read_request() -> Request | None:
    """The `accelerate launch` that started this process, or None: torchrun, plain python, or not visible."""
    arguments = _launch_arguments(_command_line(os.getppid()))
    return None if arguments is None else request_of(arguments)


def request_of(arguments: Sequence[str]) -> Request | None:
    """What the words after `accelerate launch` ask for, or None where accelerate does not understand them."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    try:
        args, _ = launch_command_parser().parse_known_args(list(arguments))
    except SystemExit:
        return None
    file = args.config_file
    if file is None and os.path.isfile(default_config_file) and not args.cpu:
        file = default_config_file
    written = _read_yaml(file)
    kind = str(written.get("distributed_type", "NO"))
    engine = "plain"
    if args.use_deepspeed or kind == "DEEPSPEED":
        engine = "DeepSpeed"
    elif args.use_fsdp or kind == "FSDP":
        engine = "FSDP"
    elif args.multi_gpu or kind.startswith("MULTI_"):
        engine = "DDP"
    processes = args.num_processes if args.num_processes is not None else written.get("num_processes")
    on_cpu = bool(args.cpu or written.get("use_cpu") or kind == "MULTI_CPU")
    return Request(file, engine, processes, on_cpu, written)


def check_launch(request: Request | None, recipe: RunRecipe, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch that became another one, or whose configuration contradicts the recipe.

    Args:
        request: what was typed, where it is visible; without it only the environment is looked at.
        recipe: says the precision.
        environment: of this rank, as the launcher made it.

    Raises:
        UserError: which key of which file, and what to do.
    """
    name = request.name if request is not None else "the accelerate configuration"
    started = int(environment.get("WORLD_SIZE", "1"))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in environment:
        raise UserError(
            f"srun started {tasks} tasks that know nothing of each other, and each would train alone: start one "
            "`accelerate launch` or `torchrun` on each node"
        )
    if request is not None:
        check_keys(request)
        running = _engine_of(environment)
        if request.engine in ("DeepSpeed", "FSDP") and running != request.engine:
            raise UserError(
                f"{name} asks for {request.engine}, and accelerate started a plain process: leave --cpu, use_cpu: true "
                "and MULTI_CPU out; without a GPU the script finds the CPU by itself"
            )
        if request.processes is not None and request.processes != started:
            why = "--cpu, use_cpu: true and MULTI_CPU start one" if request.on_cpu else f"{name} is for one process"
            raise UserError(
                f"{request.processes} processes were asked (num_processes) and {started} started: {why}; say "
                "--config_file accelerate_configs/ddp.yaml, which finds the CPU by itself where there is no GPU"
            )
    check_precision(name, recipe, environment.get("ACCELERATE_MIXED_PRECISION", "no").lower())


def check_precision(name: str, recipe: RunRecipe, theirs: str, complain: Complain = refuse) -> None:
    """Complain where accelerate's mixed_precision is neither `no` nor what the recipe says."""
    ours = "bf16" if recipe.bf16 else "fp16" if recipe.fp16 else "no"
    if theirs not in ("no", ours):
        said = f"{ours}: true" if ours != "no" else "neither bf16 nor fp16"
        complain(
            f"{name}: mixed_precision ({theirs}) and the recipe ({said}) contradict each other: leave mixed_precision "
            f"out and say {theirs}: true or false in the recipe"
        )


def check_keys(request: Request, complain: Complain = refuse) -> None:
    """Keys of the file that accelerate drops without a word."""
    from accelerate.commands.launch import launch_command_parser

    groups = {group.title: group for group in launch_command_parser()._action_groups}
    for section, title, prefix in (
        ("deepspeed_config", "DeepSpeed Arguments", ""),
        ("fsdp_config", "FSDP Arguments", "fsdp_"),
    ):
        known = [action.dest for action in groups[title]._group_actions]
        for key in request.written.get(section) or {}:
            if key not in known and f"{prefix}{key}" not in known:
                complain(f"{request.name}: {section} has no key '{key}'{did_you_mean(key, sorted(known))}")
    for key, default in FLAGS_ONLY.items():
        if request.written.get(key, default) != default:
            complain(f"{request.name}: {key} has no effect in a file: give it to accelerate launch as the flag --{key}")


def _engine_of(environment: Mapping[str, str]) -> str:
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "DeepSpeed"
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "FSDP"
    return "DDP" if int(environment.get("WORLD_SIZE", "1")) > 1 else "plain"


def _command_line(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line, in any of the ways to spell it."""
    for place, word in enumerate(command):
        name = os.path.basename(word)
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return command[place + 1 :]
        if name == "launch.py" and word.endswith(os.path.join("accelerate", "commands", "launch.py")):
            return command[place + 1 :]
        follows = command[place + 1] if place + 1 < len(command) else ""
        if (name == "accelerate" or word == "accelerate.commands.accelerate_cli") and follows == "launch":
            return command[place + 2 :]
    return None


def _read_yaml(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        written = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}  # accelerate itself has refused it, or it was never meant for this machine
    return written if isinstance(written, dict) else {}
