"""The request of `isotune plan`: a recipe and a launch, read to the end even where they are wrong.

The launch is read from accelerate's and DeepSpeed's files, without starting a process.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from isotune.config import RunRecipe
from isotune.config.command_line import CommandLine
from isotune.config.recipes import TASKS, project_of, task_of
from isotune.distributed.deepspeed_config import offloaded, read_deepspeed_config, stage_of
from isotune.distributed.launch import check_keys, check_precision, request_of
from isotune.distributed.launch_file import read_launch_file
from isotune.distributed.precision import with_precision
from isotune.io import shipped
from isotune.io.errors import Complain, UserError, did_you_mean, shown
from isotune.io.reading import Unreadable
from isotune.io.variables import MAX_PROCESSES
from isotune.models.opening import load_config

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
    """An engine (plain, DDP, DeepSpeed or FSDP) on a number of processes over all nodes."""

    engine: str
    world_size: int
    name: str = "no launch configuration"  # the configuration file, or a description of it
    deepspeed_config: Mapping[str, Any] | None = None  # the complete one; None under other engines
    offload: tuple[str, ...] = ()  # parts in host memory: `optimizer`, `param`

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage, None without DeepSpeed."""
        return stage_of(self.deepspeed_config) if self.engine == DEEPSPEED else None

    @property
    def zero_optimization(self) -> Mapping[str, Any]:
        """DeepSpeed's section of that name; empty without DeepSpeed."""
        return (self.deepspeed_config or {}).get("zero_optimization", {})

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


@dataclass(frozen=True)
class PreflightRequest:
    """A recipe and its launch, with all their mistakes."""

    recipe: RunRecipe
    launch: Launch
    problems: tuple[str, ...]  # each a sentence
    guess: str | None = None  # the sentence that names the task where only the model suggests it
    chose_precision: bool = False  # by `precision: auto` for this machine


def read_preflight_request(
    config: Path | None, flags: Sequence[str], accelerate_config: str | None, world_size: int | None
) -> PreflightRequest:
    """Read a recipe file (None is flags alone), flags over it, and a launch configuration.

    `accelerate_config` is accelerate's YAML, and None plain training, or DDP for a `world_size` above 1, which wins
    over the file. Raises UserError for a file that cannot be read as what it is, flags with too few or too many words,
    an unknown task, or no process.
    """
    if world_size is not None and not 1 <= world_size <= MAX_PROCESSES:
        raise UserError(f"--world_size is {world_size}: a launch has from 1 to {MAX_PROCESSES:,} processes")
    problems: list[str] = []
    recipe, guess = _read_recipe(CommandLine.parse(flags, config), problems)
    chose_precision, recipe = recipe.precision is not None, with_precision(recipe, {})
    launch = _read_launch(accelerate_config, world_size, recipe, problems.append)
    return PreflightRequest(recipe, launch, tuple(problems), guess, chose_precision)


def _read_recipe(command: CommandLine, problems: list[str]) -> tuple[RunRecipe, str | None]:
    """The recipe, and the sentence of a guess about its task."""
    given, guess = command.given(), None
    if project := project_of(given):
        if why_not := project.why_not_planned(given):
            raise UserError(why_not)
        kind = project.recipe
    else:
        task = task_of(given)
        if task is None:
            task, guess = _guess_task(command)
            if guess is None:
                problems.append("task is missing: add task: sft or task: classification to the recipe")
        elif not isinstance(task, str) or task not in TASKS:
            raise UserError(f"task is {shown(task)}{did_you_mean(task, TASKS)}")
        kind = TASKS[task]
    command.answer_help(kind.keys(), None, "isotune plan", "Keys of the recipe; `isotune plan --help` has more flags.")
    return kind.from_layers(command.layers(kind.keys()), problems.append), guess


def _guess_task(command: CommandLine) -> tuple[str, str | None]:
    """The task that the model's architecture suggests, and the sentence of the guess; None where no model is found."""
    unchecked = TASKS["sft"].from_layers(command.layers(TASKS["sft"].keys()), lambda sentence: None)
    try:
        architecture = load_config(unchecked).model_type
    except UserError:
        return "sft", None
    # transformers has causal models of encoders too
    is_encoder = architecture in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    task = "sft" if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_encoder else "classification"
    return task, f"task is guessed to be {task} from the model's type, {architecture}: say task: {task}"


def _read_launch(file: str | None, world_size: int | None, recipe: RunRecipe, complain: Complain) -> Launch:
    """The launch that accelerate would start for a recipe, which fills DeepSpeed's `auto` values."""
    if file is None:
        return shipped_launch("ddp", world_size or 1)
    from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig

    keys = _read_keys(file, complain)
    known = sorted({field.name for config in (ClusterConfig, SageMakerConfig) for field in fields(config)})
    for key in keys:
        if key not in known:
            complain(f"{file}: accelerate has no key '{key}'{did_you_mean(key, known)}")
    request = request_of(["--config_file", file, "script.py"]) if keys else None
    if request is None:
        return replace(shipped_launch("ddp", world_size or 1), name=file)
    check_keys(request, complain)
    check_precision(file, recipe, str(keys.get("mixed_precision") or "no").lower(), complain)
    if request.on_cpu:
        complain(f"{file}: use_cpu: true and MULTI_CPU start one plain process: leave them out; the script finds a CPU")
    count = world_size or request.processes or 1
    engine = request.engine
    if engine == PLAIN and count > 1:
        complain(f"{file} is for one process, and num_processes is {count}: take {shipped.engine('ddp')}")
    if engine == DDP and count == 1:
        engine = PLAIN
    if engine == DEEPSPEED:
        section = keys.get("deepspeed_config") or {}
        environment = {name: str(section[key]) for key, name in _DEEPSPEED_VARIABLES.items() if key in section}
        environment["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(section)
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a GPU and warn
        config = read_deepspeed_config(recipe, count, environment, file, complain)
        return Launch(engine, count, file, config, tuple(offloaded(config)))
    offload = (keys.get("fsdp_config") or {}).get("fsdp_offload_params") is True
    return Launch(engine, count, file, None, ("param", "optimizer") if engine == FSDP and offload else ())


def _read_keys(file: str, complain: Complain) -> dict[str, Any]:
    try:
        return read_launch_file(Path(file))
    except FileNotFoundError:
        complain(f"--accelerate_config {file} cannot be read: there is no such file")
    except Unreadable as reason:
        complain(reason.of(file))
    return {}
