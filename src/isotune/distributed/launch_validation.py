"""Compare the launch that the user asked for with the one that accelerate started, and refuse a difference.

accelerate 1.15 starts one plain process for `--cpu`, for `use_cpu: true` and for a MULTI_CPU configuration, whatever
engine and number of processes the user asked for, and drops keys that it does not know. The ranks' environment holds
only the outcome. The request itself is the command line of their parent process, which Linux shows in /proc.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isotune.compat.accelerate import launcher_options
from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import INLINE
from isotune.io.errors import Complain, UserError, did_you_mean, refuse

FLAGS_ONLY = {"rdzv_backend": "static", "same_network": False}  # accelerate 1.15 reads these from its flags alone


@dataclass(frozen=True)
class Request:
    """An `accelerate launch` as the user typed it.

    Attributes:
        file: the configuration file as given; None without one.
        engine: DDP, DeepSpeed, FSDP or plain.
        processes: number over all nodes; None where it is not given.
        on_cpu: --cpu, or use_cpu or MULTI_CPU in the file.
        file_keys: the keys and values of the file.
    """

    file: str | None
    engine: str
    processes: int | None
    on_cpu: bool
    file_keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file, or a description of it."""
        return self.file or INLINE


def read_request() -> Request | None:
    """The `accelerate launch` that started this process; None under torchrun, python, or without /proc."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    arguments = launch_arguments(command)
    return None if arguments is None else request_of(arguments)


def launch_arguments(command: list[str]) -> list[str] | None:
    """The arguments after `accelerate launch` in a command line, in any spelling of that command."""
    for index, word in enumerate(command):
        name, rest = os.path.basename(word), command[index + 1 :]
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return rest
        if word.endswith(os.path.join("accelerate", "commands", "launch.py")):
            return rest
        if (name == "accelerate" or word == "accelerate.commands.accelerate_cli") and rest[:1] == ["launch"]:
            return rest[1:]
    return None


def request_of(arguments: Sequence[str]) -> Request | None:
    """Parse the arguments after `accelerate launch`; None where accelerate does not accept them."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    try:
        args, _ = launch_command_parser().parse_known_args(list(arguments))
    except SystemExit:
        return None
    file = args.config_file
    if file is None and os.path.isfile(default_config_file) and not args.cpu:
        file = default_config_file
    file_keys = _keys_of(file) if file else {}
    kind = str(file_keys.get("distributed_type", "NO"))
    engine = "plain"
    if args.use_deepspeed or kind == "DEEPSPEED":
        engine = "DeepSpeed"
    elif args.use_fsdp or kind == "FSDP":
        engine = "FSDP"
    elif args.multi_gpu or kind.startswith("MULTI_"):
        engine = "DDP"
    processes = args.num_processes if args.num_processes is not None else file_keys.get("num_processes")
    on_cpu = bool(args.cpu or file_keys.get("use_cpu") or kind == "MULTI_CPU")
    return Request(file, engine, processes, on_cpu, file_keys)


def _keys_of(file: str) -> dict[str, Any]:
    try:
        written = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}  # accelerate itself reports an unreadable file
    return written if isinstance(written, dict) else {}


def engine_of(environment: Mapping[str, str]) -> str:
    """The engine that accelerate started a rank for: DeepSpeed, FSDP, DDP or plain."""
    for engine in ("DeepSpeed", "FSDP"):
        if environment.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true":
            return engine
    return "DDP" if int(environment.get("WORLD_SIZE", "1")) > 1 else "plain"


def check_launch(request: Request | None, recipe: RunRecipe, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch that is not the requested one, or whose configuration contradicts the recipe.

    Without a request only the environment is checked, which the launcher set for this rank.

    Raises:
        UserError: names the key, its file and the remedy.
    """
    name = request.name if request is not None else INLINE
    started_processes = int(environment.get("WORLD_SIZE", "1"))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in environment:
        raise UserError(
            f"srun started {tasks} independent tasks, and each would train alone: start one "
            "`accelerate launch` or `torchrun` on each node"
        )
    if request is not None:
        check_keys(request)
        if request.engine in ("DeepSpeed", "FSDP") and engine_of(environment) != request.engine:
            raise UserError(
                f"{name} asks for {request.engine}, and accelerate started a plain process: leave --cpu, use_cpu: true "
                "and MULTI_CPU out; without a GPU the script finds the CPU by itself"
            )
        if request.processes is not None and request.processes != started_processes:
            why = "--cpu, use_cpu: true and MULTI_CPU start one" if request.on_cpu else f"{name} is for one process"
            raise UserError(
                f"{request.processes} processes were asked (num_processes) and {started_processes} started: {why}; say "
                "--config_file accelerate_configs/ddp.yaml, which finds the CPU by itself where there is no GPU"
            )
    check_precision(name, recipe, environment.get("ACCELERATE_MIXED_PRECISION", "no").lower())


def check_precision(name: str, recipe: RunRecipe, theirs: str, complain: Complain = refuse) -> None:
    """Complain where accelerate's mixed_precision is neither `no` nor the recipe's precision."""
    ours = "bf16" if recipe.bf16 else "fp16" if recipe.fp16 else "no"
    if theirs not in ("no", ours):
        expected = f"{ours}: true" if ours != "no" else "neither bf16 nor fp16"
        complain(
            f"{name}: mixed_precision ({theirs}) and the recipe ({expected}) contradict each other: leave "
            f"mixed_precision out and say {theirs}: true or false in the recipe"
        )


def check_keys(request: Request, complain: Complain = refuse) -> None:
    """Complain about keys of the file that accelerate drops without a message."""
    for section, title, prefix in (
        ("deepspeed_config", "DeepSpeed Arguments", ""),
        ("fsdp_config", "FSDP Arguments", "fsdp_"),
    ):
        known = launcher_options(title)
        for key in request.file_keys.get(section) or {}:
            if key not in known and f"{prefix}{key}" not in known:
                complain(f"{request.name}: {section} has no key '{key}'{did_you_mean(key, sorted(known))}")
    for key, default in FLAGS_ONLY.items():
        if request.file_keys.get(key, default) != default:
            complain(f"{request.name}: {key} has no effect in a file: give it to accelerate launch as the flag --{key}")
