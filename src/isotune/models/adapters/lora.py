"""Adapters (LoRA, IA3) on the layers that adapter_targets.py chooses, and the head that is trained beside them."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from isotune.config import ClassificationRecipe, RunRecipe
from isotune.io.errors import UserError, first_line, nearest
from isotune.models.adapters.targets import Targets, check_patterns, choose_targets
from isotune.models.base.hub import commit_of_base
from isotune.models.layouts.heads import head_modules
from isotune.models.log_control import quiet_libraries

# Second layers of feed-forward networks: IA3 scales what goes into them, and what comes out of every other.
IA3_FEEDFORWARD = frozenset(
    {"fc2", "down_proj", "wo", "lin2", "ffn_output", "c_proj", "dense_4h_to_h", "fc_out", "w2", "Wo"}
)


def add_adapters(model: PreTrainedModel, recipe: RunRecipe) -> nn.Module:
    """Wrap a base model with the recipe's adapters; everything else is frozen, but for a classifier's head.

    Adapter weights are fp32 and drawn from the recipe's seed, so they are the same on every process; biases that are
    trained are fp32 too. UserError for a name that matches nothing in the model.
    """
    from peft import IA3Config, LoraConfig, TaskType, get_peft_model

    targets = choose_targets(model, recipe)
    _check_modules_to_save(model, recipe, targets)
    head = head_modules(model) if isinstance(recipe, ClassificationRecipe) else []
    model.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
        "target_modules": targets.pattern,
        "exclude_modules": targets.excluded,
        "modules_to_save": [*(recipe.modules_to_save or ()), *head] or None,
        "revision": commit_of_base(recipe),
        "fan_in_fan_out": isinstance(model.get_submodule(targets.names[0]), Conv1D),
    }
    if recipe.peft_type == "ia3":
        # as in the paper: keys, values, and what goes into the second layer of a block's feed-forward network
        second = [name for name in targets.names if name.rsplit(".", 1)[-1] in IA3_FEEDFORWARD]
        common |= {"target_modules": list(targets.names), "exclude_modules": None}
        config: Any = IA3Config(**common, feedforward_modules=second)
    else:
        check_patterns(recipe, targets)
        keys = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "init_lora_weights")
        config = LoraConfig(
            **common,
            **{key: getattr(recipe, key) for key in keys},
            rank_pattern=dict(recipe.rank_pattern or {}),
            alpha_pattern=dict(recipe.alpha_pattern or {}),
        )
    try:
        with quiet_libraries():  # peft 0.21 uses a deprecated name of transformers 5.23
            adapted = get_peft_model(model, config)
    except ValueError as error:  # of options that peft does not combine
        raise UserError(f"peft cannot add these adapters: {first_line(error)}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in adapted.modules():  # bias: all trains those of norms, whose kernels take one dtype for both
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        is_norm = not isinstance(module, nn.Linear | Conv1D)
        if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and is_norm:
            weight.data = weight.data.to(bias.dtype)
    return adapted


def _check_modules_to_save(model: nn.Module, recipe: RunRecipe, targets: Targets) -> None:
    """UserError for a name in modules_to_save that matches no module, or one that gets an adapter."""
    names = [name for name, _ in model.named_modules() if name]
    for wanted in recipe.modules_to_save or ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            near = nearest(wanted, {name.rsplit(".", 1)[-1] for name in names})
            hint = f": did you mean '{near}'?" if near else ""
            raise UserError(f"modules_to_save names '{wanted}', which {type(model).__name__} does not have{hint}")
        if any(name == wanted or name.endswith(f".{wanted}") for name in targets.names):
            raise UserError(f"modules_to_save names '{wanted}', which gets an adapter: take it out of one of them")
