"""One process of a launch: check that it is the launch that was asked for, and set up its device and process group.

accelerate 1.15 starts one plain process for `--cpu`, for `use_cpu: true` and for a MULTI_CPU configuration, whatever
engine and number of processes the user asked for, and drops keys that it does not know. The ranks' environment holds
only the outcome. The request itself is the command line of their parent process, which Linux shows in /proc.

The same command works with and without a GPU; without one, accelerate needs two workarounds:
- the backend must be named before anything else creates a PartialState: DeepSpeed would look for NCCL, and two
  processes of a MULTI_GPU configuration would each train alone without an error;
- FSDP needs the distributed type MULTI_GPU (`isotune.compat.accelerate`).
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from isotune.compat.accelerate import allow_fsdp_on_cpu, launcher_options
from isotune.compat.deepspeed import disable_shm_transport
from isotune.config import RunRecipe
from isotune.distributed.deepspeed_config import INLINE, read_deepspeed_config, stage_of
from isotune.distributed.device import choose_device
from isotune.distributed.launch_file import read_launch_file
from isotune.distributed.rendezvous import rendezvous
from isotune.distributed.watchdog import Watchdog
from isotune.io import shipped
from isotune.io.errors import Complain, UserError, did_you_mean, refuse
from isotune.io.extras import need
from isotune.io.reading import Unreadable

COLLECTIVE_TIMEOUT_MARGIN_SECONDS = 60
MAX_COLLECTIVE_TIMEOUT_SECONDS = 10_000_000  # four months: nobody waits longer, and libraries count in milliseconds
LAUNCH_MODULES = ("accelerate.commands.launch", "isotune.distributed.accelerate_launch")
FLAGS_ONLY = {"rdzv_backend": "static", "same_network": False}  # accelerate 1.15 reads these from its flags alone


@dataclass(frozen=True)
class Process:
    """This process's place in the launch, and the engine that was asked for."""

    rank: int
    world_size: int
    device: torch.device
    fsdp: bool = False
    deepspeed_config: dict[str, Any] | None = None  # complete, without `auto`; None under every other engine
    # HfDeepSpeedConfig, which transformers holds weakly and needs while a model loads
    keep_alive: Any = field(default=None, repr=False, compare=False)
    watchdog: Watchdog = field(default_factory=Watchdog, repr=False, compare=False)

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
        shards_weights = self.fsdp or self.zero_stage == 3
        return torch.device("cpu") if shards_weights and recipe.tune != "qlora" else self.device

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage that was asked for; None without DeepSpeed."""
        return stage_of(self.deepspeed_config) if self.deepspeed else None


def start_process(recipe: RunRecipe) -> Process:
    """Create the process group. Call it before the model and TrainingArguments are created.

    UserError where the launch is not the one that was asked for, or its configuration contradicts the recipe; RunFault
    where ranks do not reach each other, with their addresses.
    """
    world_size, engine = int(os.environ.get("WORLD_SIZE", "1")), engine_of(os.environ)
    on_cpu = choose_device(recipe.device, world_size) == "cpu"
    check_extras(recipe, engine)
    if on_cpu and torch.cuda.is_available() and engine in ("DeepSpeed", "FSDP"):
        raise UserError(f"device: cpu under {engine} beside a GPU: hide it by an empty CUDA_VISIBLE_DEVICES instead")
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
    with rendezvous(recipe.rendezvous_timeout):
        state = _make_state(recipe, world_size, engine, on_cpu)
    watchdog = Watchdog(_timeout_seconds(recipe))
    watchdog.start()
    if stage_of(config) == 3:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        # weights that are trained are loaded as they are, and rounded when the engine has kept what rounding changes
        as_loaded = {} if recipe.tune != "full" else {key: {"enabled": False} for key in ("bf16", "fp16")}
        keep_alive = HfDeepSpeedConfig({**(config or {}), **as_loaded})
    device = torch.device(state.device)  # type: ignore[arg-type]  (declared as a device, a string or None)
    return Process(state.process_index, state.num_processes, device, engine == "FSDP", config, keep_alive, watchdog)


def check_extras(recipe: RunRecipe, engine: str) -> None:
    """UserError where a package that this run needs is not installed."""
    if engine == "DeepSpeed":
        need("deepspeed", "ZeRO")
    if recipe.tune == "qlora":
        need("bitsandbytes", "tune: qlora")


def _timeout_seconds(recipe: RunRecipe) -> int:
    return min(recipe.training_arguments["ddp_timeout"], MAX_COLLECTIVE_TIMEOUT_SECONDS)


def _make_state(recipe: RunRecipe, world_size: int, engine: str, on_cpu: bool) -> PartialState:
    # longer than the watchdog's, which can name the rank that hangs
    seconds = _timeout_seconds(recipe) + COLLECTIVE_TIMEOUT_MARGIN_SECONDS
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


@dataclass(frozen=True)
class Request:
    """An `accelerate launch` as the user typed it."""

    file: str | None  # the configuration file as given
    engine: str  # DDP, DeepSpeed, FSDP or plain
    processes: int | None  # over all nodes; None where their number is not given
    on_cpu: bool  # --cpu, or use_cpu or MULTI_CPU in the file
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
        if name == "accelerate-launch" or word in LAUNCH_MODULES:
            return rest
        if word.endswith(os.path.join("accelerate", "commands", "launch.py")):
            return rest
        if (name == "accelerate" or word == "accelerate.commands.accelerate_cli") and rest[:1] == ["launch"]:
            return rest[1:]
    return None


def request_of(arguments: Sequence[str]) -> Request | None:
    """Parse the arguments after `accelerate launch`; None where accelerate does not accept them.

    UserError for a configuration file that cannot be read, or whose value is none that its key takes.
    """
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    try:
        args, _ = launch_command_parser().parse_known_args(list(arguments))
    except SystemExit:
        return None
    file = args.config_file
    if file is None and os.path.isfile(default_config_file) and not args.cpu:
        file = default_config_file
    file_keys: dict[str, Any] = {}
    with suppress(FileNotFoundError):  # accelerate itself says so
        try:
            file_keys = read_launch_file(Path(file)) if file else {}
        except Unreadable as reason:
            raise UserError(reason.of(file)) from reason
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


def engine_of(environment: Mapping[str, str]) -> str:
    """The engine that accelerate started a rank for: DeepSpeed, FSDP, DDP or plain."""
    for engine in ("DeepSpeed", "FSDP"):
        if environment.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true":
            return engine
    return "DDP" if int(environment.get("WORLD_SIZE", "1")) > 1 else "plain"


def check_launch(request: Request | None, recipe: RunRecipe, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch that is not the requested one, or whose configuration contradicts the recipe.

    Without a request only the environment is checked, which the launcher set for this rank.
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
                f"{shipped.engine('ddp')}, which finds the CPU by itself where there is no GPU"
            )
    check_precision(name, recipe, environment.get("ACCELERATE_MIXED_PRECISION", "no").lower())


def check_precision(name: str, recipe: RunRecipe, theirs: str, complain: Complain = refuse) -> None:
    """Complain where accelerate's mixed_precision is neither `no` nor the recipe's precision."""
    ours = recipe.mixed_precision
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
