"""Which layers of a base model get an adapter: by their names, by a regular expression, or by the rule `all-linear`.

Every name that a recipe gives is checked against the model before training: one that matches nothing is a UserError
with the nearest name that would.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from isotune.compat.peft import names_of_experts, refused_in_mamba
from isotune.compat.transformers import weights_read_alone
from isotune.io.errors import UserError, nearest

ALL_LINEAR = "all-linear"

# The projections of the blocks of architectures that were looked at; any other gets the rule of `all-linear`.
DEFAULT_TARGETS = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "bert": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "roberta": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "xlm-roberta": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "albert": ["query", "key", "value", "attention.dense", "ffn", "ffn_output"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Targets:
    """The layers of a model that get an adapter, and how peft is told so."""

    pattern: list[str] | str  # ends of names, or a regular expression of whole names
    excluded: list[str] | str | None
    names: tuple[str, ...]  # of the layers, whole
    left_out: tuple[str, ...] = ()  # layers of the rule `all-linear` that peft's LoRA does not reach


def choose_targets(model: PreTrainedModel, recipe: Any) -> Targets:
    """The layers that the recipe's target_modules, exclude_modules and layers_to_transform leave.

    UserError where a name matches no linear layer of the model, or nothing is left.
    """
    output, kind = model.get_output_embeddings(), model.config.model_type
    layers = {name: layer for name, layer in linear_layers(model).items() if layer is not output}
    unreached = _unreached(model, layers) if recipe.peft_type == "lora" else {}
    asked, left_out = recipe.target_modules or DEFAULT_TARGETS.get(kind) or [ALL_LINEAR], ()
    if asked == [ALL_LINEAR]:
        blocks = names_of_blocks(model)
        left_out = tuple(name for name in blocks if name in unreached)
        modules = [name for name, _ in model.named_modules()]  # peft looks at all of them
        pattern = _ends_of([name for name in blocks if name not in unreached], modules)
        if not pattern:
            raise UserError(
                f"{type(model).__name__} has no linear layers in blocks, so target_modules has to name some: "
                f"it has {', '.join(sorted({name.rsplit('.', 1)[-1] for name in layers}))}"
            )
    else:
        pattern = _as_pattern("target_modules", asked)
        _check("target_modules", pattern, layers, model)
    names = [name for name in layers if _matches(pattern, name)]
    if wrong := [name for name in names if name in unreached]:
        raise UserError(f"target_modules names {wrong[0]}, and {unreached[wrong[0]]}: leave it out")
    excluded = None
    if recipe.exclude_modules:
        excluded = _as_pattern("exclude_modules", recipe.exclude_modules)
        _check("exclude_modules", excluded, names, model)
        names = [name for name in names if not _matches(excluded, name)]
    chosen = recipe.layers_to_transform
    if chosen is not None:
        numbers = {block_of(name) for name in names} - {None}
        missing = sorted(set(chosen) - numbers)
        if missing and model.device.type != "meta":  # an estimate may build fewer blocks
            raise UserError(
                f"layers_to_transform names layer {missing[0]}, and the layers of target_modules are in the blocks "
                f"{_ranges(numbers)}"
            )
        names = [name for name in names if block_of(name) in set(chosen)] or names
        return Targets(names, None, tuple(names), left_out)  # peft has no numbers beside a regular expression
    if not names:
        raise UserError("exclude_modules leaves no layer of target_modules: take a name out of it")
    if isinstance(pattern, str) and recipe.peft_type == "lora" and names_of_experts(kind):
        pattern, excluded = names, None  # there peft takes the ends of the names that an expression matches
    return Targets(pattern, excluded, tuple(names), left_out)


def _unreached(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers that peft gives no LoRA, or one of another shape, by whole names, and why."""
    kind = model.config.model_type
    ends = {name: name.rsplit(".", 1)[-1] for name in layers}
    experts = names_of_experts(kind)
    mamba = {end for end in set(ends.values()) if refused_in_mamba(model, end)}
    found = {name: f"peft refuses '{end}' in model type '{kind}'" for name, end in ends.items() if end in mamba}
    for name, layer in layers.items():
        if type(layer).__name__.endswith("GroupedLinear"):  # a product for each group of features, as DeepSeek V4 has
            found[name] = f"'{ends[name]}' of model type '{kind}' multiplies groups of features apart"
    for name, module in model.named_modules():
        for end in weights_read_alone(type(module)) if hasattr(module, "A_log") else ():
            if f"{name}.{end}" in ends:
                found.setdefault(f"{name}.{end}", f"model type '{kind}' reads the weight of '{end}' past its adapter")
    taken = f"for the experts of model type '{kind}', whose weights target_parameters names"
    return found | {name: f"peft takes '{end}' {taken}" for name, end in ends.items() if end in experts}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are a matrix product, GPT-2's Conv1D among them, by their whole names.

    Llama 4's router is a linear layer too, and returns its choice beside the product.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: layer for name, layer in layers.items() if not type(layer).__name__.endswith("Router")}


def names_of_blocks(model: PreTrainedModel) -> list[str]:
    """The linear layers of the blocks: without the head, poolers, and what projects embeddings."""
    body = model.base_model
    stacks = [name for name, module in body.named_modules() if isinstance(module, nn.ModuleList)]
    within = tuple(f"{name}." for name in stacks)
    inside = {id(module) for name, module in linear_layers(body).items() if name.startswith(within)}
    return [name for name, module in linear_layers(model).items() if id(module) in inside]


def check_parameters(model: PreTrainedModel, recipe: Any) -> None:
    """UserError for a name in target_parameters that is no matrix of the model, or where peft cannot adapt it."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() in (2, 3)]
    is_estimate = model.device.type == "meta"  # which may build fewer blocks
    for item in recipe.target_parameters or ():
        if not is_estimate and not any(_matches([item], name) for name in names):
            stacked = {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
            ends = sorted({".".join(name.split(".")[-2:]) for name in stacked})
            hint = f"did you mean '{near}'? " if (near := nearest(item, ends)) else ""
            has = f"it has {', '.join(ends)}" if ends else "it has no experts whose matrices are one weight"
            raise UserError(
                f"target_parameters names '{item}', which {type(model).__name__} does not have: {hint}{has}"
            )
    if recipe.target_parameters and isinstance(recipe.init_lora_weights, str):
        raise UserError(f"init_lora_weights: {recipe.init_lora_weights} is for layers, and target_parameters are none")
    if recipe.target_parameters and recipe.layers_to_transform is not None:
        raise UserError(
            "layers_to_transform is for layers: name the blocks in target_parameters, as layers.0.mlp.experts.down_proj"
        )
    if recipe.target_parameters and recipe.lora_dropout:
        raise UserError(
            "target_parameters is LoRA on a weight and not on its input, which dropout needs: say lora_dropout: 0"
        )


def check_patterns(recipe: Any, targets: Targets) -> None:
    """UserError for a key of rank_pattern or alpha_pattern that matches no layer with an adapter."""
    for key in ("rank_pattern", "alpha_pattern"):
        pattern: Mapping[str, Any] = getattr(recipe, key) or {}
        for name, value in pattern.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{key} gives {value!r} for '{name}': it takes a whole number of at least 1")
            # as peft matches: the end of a name, as a regular expression
            if not any(re.match(rf"(.*\.)?({name})$", layer) for layer in targets.names):
                raise _no_such(key, name, targets.names, "the layers with an adapter")


def _as_pattern(key: str, asked: Sequence[str]) -> list[str] | str:
    """Names as they are; a regular expression, which is one item with more than a name's characters, as a text."""
    expressions = [item for item in asked if not re.fullmatch(r"[\w.\-]+", item)]
    if not expressions:
        return list(asked)
    if len(asked) > 1:
        raise UserError(
            f"{key} holds the regular expression '{expressions[0]}' beside other items: it stands alone, without "
            "commas and spaces; say a|b for either"
        )
    try:
        re.compile(asked[0])
    except re.error as error:
        raise UserError(f"{key} '{asked[0]}' is no regular expression: {error}") from None
    return asked[0]


def _matches(pattern: list[str] | str, name: str) -> bool:
    """Whether peft takes a layer of this name for one of the pattern's."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in pattern)


def _check(key: str, pattern: list[str] | str, names: Iterable[str], model: nn.Module) -> None:
    names = list(names)
    for item in [pattern] if isinstance(pattern, str) else pattern:
        if not any(_matches(pattern if isinstance(pattern, str) else [item], name) for name in names):
            whose = type(model).__name__ if key == "target_modules" else "target_modules"
            raise _no_such(key, item, names, whose)


def _no_such(key: str, item: str, names: Iterable[str], whose: str) -> UserError:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = nearest(item, [*ends, ALL_LINEAR])
    hint = f"did you mean '{near}'? " if near else ""
    return UserError(f"{key} names '{item}', which {whose} does not have: {hint}it has {', '.join(ends)}")


def _ends_of(chosen: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The shortest list of ends of names that matches the chosen layers and no other module."""
    wanted, ends = set(chosen), set[str]()
    for name in chosen:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            end = ".".join(parts[start:])
            if end in ends or all(other in wanted for other in modules if _matches([end], other)):
                ends.add(end)
                break
    return sorted(ends)


def block_of(name: str) -> int | None:
    """The number of the block that a layer is in, as peft finds it: the first number in its name."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


def _ranges(numbers: Iterable[int | None]) -> str:
    ordered = sorted(number for number in numbers if number is not None)
    return f"{ordered[0]} to {ordered[-1]}" if ordered else "none"
