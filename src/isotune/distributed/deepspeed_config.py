"""Complete and check DeepSpeed's configuration: the recipe fills each `auto`, and a contradicting value is refused.

DeepSpeed ignores a key that it does not know, does not clip where `gradient_clipping` is absent, and prefers the batch
size, the accumulation and the precision of its own file to the trainer's. Here the recipe is the only source of each.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from isotune.config import RunRecipe
from isotune.io.errors import Complain, UserError, did_you_mean, refuse, shown
from isotune.io.extras import need
from isotune.io.reading import Unreadable, parse_json, read_text
from isotune.io.shipped import ROOT

INLINE = "the accelerate configuration"
AUTO = "auto"
SECTIONS = ("amp", "torch_autocast")  # that are looked into and that DeepSpeed itself does not check
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # DeepSpeed's names, torch's


def read_deepspeed_config(
    recipe: RunRecipe,
    world_size: int,
    environment: Mapping[str, str] = os.environ,
    name: str = INLINE,
    complain: Complain = refuse,
) -> dict[str, Any]:
    """The complete configuration of a launch under DeepSpeed, from its JSON file or from the accelerate file's keys.

    accelerate passes its file's keys on in `environment`; `name` is that file, for messages. `complain` takes a
    missing or broken file, an unknown key, and one that contradicts the recipe.
    """
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    accelerate_keys = (environment.get("ACCELERATE_CONFIG_DS_FIELDS") or "").split(",")
    if file != "none":
        path = find_file(file)
        config = _read_json(path)
        name = str(path)
        for key in ("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "mixed_precision"):
            if key in accelerate_keys:
                complain(f"the accelerate configuration says {key}, and so may {path}: take it out of the first")
    else:
        config = _inline(environment)
    return complete(config, recipe, world_size, name, complain)


def complete(
    config: dict[str, Any], recipe: RunRecipe, world_size: int, name: str, complain: Complain = refuse
) -> dict[str, Any]:
    """`config`, of the file `name`, with its keys and values checked and the rest filled in from the recipe."""
    _check_sections(config, name, complain)
    for sentence in _contradictions(config, recipe):
        complain(f"{name} {sentence}")
    filled = {
        **config,
        **{key: {**(config.get(key) or {}), "enabled": getattr(recipe, key)} for key in ("bf16", "fp16")},
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(recipe.training_arguments["max_grad_norm"]),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }
    if recipe.bf16:
        # gradients would otherwise be summed in bf16, over ranks and over microbatches; without ZeRO the latter has to
        filled = {"communication_data_type": "fp32", **filled}
        if stage_of(config) > 0:
            filled["data_types"] = {"grad_accum_dtype": "fp32", **(config.get("data_types") or {})}
    return filled


def gradient_dtypes(config: Mapping[str, Any]) -> tuple[str, str]:
    """The types, by torch's names, in which a complete configuration sums gradients: of microbatches, and of ranks."""
    own = next((key for key in ("bf16", "fp16") if config[key]["enabled"]), "fp32")
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype") or own
    return DTYPES[accumulated], DTYPES[config.get("communication_data_type") or own]


def stage_of(config: Mapping[str, Any] | None) -> int:
    """The ZeRO stage that a configuration asks for; 0 without one."""
    return int(((config or {}).get("zero_optimization") or {}).get("stage", 0))


def offloaded(config: Mapping[str, Any] | None) -> list[str]:
    """The parts that a configuration offloads from the device: `optimizer`, `param`."""
    zero = (config or {}).get("zero_optimization") or {}
    devices = {part: (zero.get(f"offload_{part}") or {}).get("device", "none") for part in ("optimizer", "param")}
    return [part for part, device in devices.items() if device not in ("none", None)]


def find_file(file: str) -> Path:
    """Find a file relative to the current folder or to the shipped files."""
    path = Path(file).expanduser()
    if path.is_file():
        return path
    if not path.is_absolute() and (ROOT / path).is_file():
        return ROOT / path
    raise UserError(f"deepspeed_config_file '{file}' does not exist, neither here nor in {(ROOT / path).parent}")


def _read_json(path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path} says {key} twice: keep one of them")
        return dict(pairs)

    try:
        text = read_text(path)
    except (FileNotFoundError, Unreadable) as error:
        raise UserError(f"deepspeed_config_file {path} cannot be read: {error}") from error
    try:
        config = parse_json(text, no_duplicates)
    except Unreadable as reason:
        where = f"{path}, line {reason.line}," if reason.line is not None else f"{path}"
        raise UserError(f"{where} {str(reason).removeprefix('it ')}") from reason
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object of DeepSpeed's keys")
    return config


def _inline(environment: Mapping[str, str]) -> dict[str, Any]:
    """The configuration of accelerate's own keys, without a JSON file."""
    read = lambda key, default: environment.get(f"ACCELERATE_{key}", default)  # noqa: E731
    zero: dict[str, Any] = {"stage": _number("zero_stage", read("DEEPSPEED_ZERO_STAGE", "2"), int)}
    for part in ("optimizer", "param"):
        prefix = f"DEEPSPEED_OFFLOAD_{part.upper()}"
        device = read(f"{prefix}_DEVICE", "none")
        path = {"nvme_path": read(f"{prefix}_NVME_PATH", "none")} if device == "nvme" else {}
        if device != "none":
            zero[f"offload_{part}"] = {"device": device, **path}
    config: dict[str, Any] = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": zero}
    for key, number in (("gradient_clipping", float), ("gradient_accumulation_steps", int)):
        value = read(key.upper(), AUTO)
        config[key] = value if value == AUTO else _number(key, value, number)
    return config


def _number(key: str, value: str, kind: type[int] | type[float]) -> float:
    """The number of a key of accelerate's file, which it passes on as text."""
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{INLINE}: deepspeed_config.{key} is {shown(value)}: it takes a number") from None


def _cut(value: Any) -> str:
    """A value as its file has it, in a sentence."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _contradictions(config: Mapping[str, Any], recipe: RunRecipe) -> Iterator[str]:
    by_recipe = {
        "optimizer": "optim, learning_rate and weight_decay",
        "scheduler": "lr_scheduler_type and warmup_steps",
    }
    for key, ours in by_recipe.items():
        if key in config:
            yield f"has a section '{key}', and the recipe says {ours}: take the section out"
    for key in ("tensor_parallel", "expert_parallel", "sequence_parallel_size", "pipeline"):
        if config.get(key):
            yield f"asks for {key}, and isotune uses data parallelism only: take it out"
    if config.get("managed_gradient_accumulation", True) is not True:
        yield "says managed_gradient_accumulation: false, and the step schedule accumulates: take it out"
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if config.get(key, AUTO) != AUTO:
            says = f"says {key}: {shown(config[key])}"
            yield f'{says}, and a step sees global_batch_size rows on any hardware: say "auto"'
    accumulation = config.get("gradient_accumulation_steps", AUTO)
    if accumulation not in (AUTO, 1):
        why = 'the step schedule lays out the microbatches of a step: say "auto"'
        yield f"says gradient_accumulation_steps: {shown(accumulation)}, and {why}"
    clipping, ours = config.get("gradient_clipping", AUTO), recipe.training_arguments["max_grad_norm"]
    if clipping not in (AUTO, ours):
        both = f"gradient_clipping: {shown(clipping)}, and the recipe max_grad_norm: {ours:g}"
        yield f'says {both}: say "auto" in the first'
    for key, on in (("bf16", recipe.bf16), ("fp16", recipe.fp16)):
        theirs = (config.get(key) or {}).get("enabled", AUTO)
        if theirs not in (AUTO, on):
            both = f"{key}.enabled: {_cut(theirs)}, and the recipe {key}: {json.dumps(on)}"
            yield f'says {both}: say "auto" in the first'
        if (config.get(key) or {}).get(f"{key}_master_weights_and_grads"):
            yield f"says {key}.{key}_master_weights_and_grads, and what is trained stays in fp32: take it out"
    sums = {"data_types.grad_accum_dtype": (config.get("data_types") or {}).get("grad_accum_dtype")}
    for key, value in {**sums, "communication_data_type": config.get("communication_data_type")}.items():
        if value is not None and (not isinstance(value, str) or value not in DTYPES):
            yield f"says {key}: {_cut(value)}: it takes {', '.join(DTYPES)}"
    for key in ("amp", "torch_autocast"):
        if (config.get(key) or {}).get("enabled"):
            yield f"enables {key}, and the recipe says the precision by bf16 and fp16: take it out"
    if "zero_optimization" not in config:
        yield 'has no zero_optimization: say at least "zero_optimization": {"stage": 0}'


def _check_sections(config: Mapping[str, Any], name: str, complain: Complain) -> None:
    """Compare the keys with those of DeepSpeed, whose pydantic model also reads the values of `zero_optimization`."""
    need("deepspeed", "ZeRO")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from pydantic import ValidationError

    known = {"": _known_keys()}
    for path, model in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
    ):
        known[path] = {alias for key, field in model.model_fields.items() for alias in (key, field.alias) if alias}
    known["fp16"].add("auto_cast")
    known["data_types"] = {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}
    for key in SECTIONS:
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{name}: {key} is {shown(config[key])}: it takes a section of keys")
    if not isinstance(config.get("communication_data_type") or "", str):
        raise UserError(
            f"{name}: communication_data_type is {shown(config['communication_data_type'])}: it takes a name"
        )
    for path, keys in known.items():
        section: Any = config
        for part in filter(None, path.split(".")):
            section = section.get(part) if isinstance(section, dict) else None
        if section is not None and not isinstance(section, dict):
            raise UserError(f"{name}: {path} is {_cut(section)}: it takes a section of keys")
        for key in section or ():
            if key not in keys:
                where = f"{path}.{key}".removeprefix(".")
                complain(f"{name}: {shown(where)} is not a key of DeepSpeed's{did_you_mean(key, sorted(keys))}")
    zero = {key: value for key, value in (config.get("zero_optimization") or {}).items() if value != AUTO}
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        sentence = f"{name}: {where} is {_cut(first.get('input'))}: {first['msg']}"
        if first["type"] != "extra_forbidden":  # nothing can be planned with a value that is not one
            raise UserError(sentence) from error
        complain(sentence)


def _known_keys() -> set[str]:
    """The top-level keys that DeepSpeed looks up in a configuration: recorded, because it has no list of them."""
    from deepspeed.runtime.config import DeepSpeedConfig

    known: set[str] = {"optimizer", "scheduler", "sequence_parallel_size", "flops_profiler", "activation_checkpointing"}

    def recorded(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_and_note(config: Any, key: Any, *default: Any) -> Any:
            known.add(key)
            return read(config, key, *default)

        return read_and_note

    class Recording(dict):
        get, __contains__, __getitem__ = recorded(dict.get), recorded(dict.__contains__), recorded(dict.__getitem__)

        def __copy__(self) -> "Recording":
            return Recording(self)

    DeepSpeedConfig(Recording({"train_micro_batch_size_per_gpu": 1}))
    return known
