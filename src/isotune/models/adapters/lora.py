"""Adapters (LoRA, IA3) on the layers that adapter_targets.py chooses, and the head that is trained beside them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from isotune.compat.bitsandbytes import keep_trained_biases
from isotune.compat.torch import one_thread
from isotune.config import ClassificationRecipe, RunRecipe
from isotune.io.errors import VALUES, UserError, first_line, nearest
from isotune.models.adapters.from_base import start_from_base, starts_from_base
from isotune.models.adapters.targets import Targets, check_parameters, check_patterns, choose_targets
from isotune.models.base.hub import commit_of_base
from isotune.models.layouts.heads import head_modules
from isotune.models.log_control import quiet_libraries

# Second layers of feed-forward networks: IA3 scales what goes into them, and what comes out of every other.
IA3_FEEDFORWARD = frozenset(
    {"fc2", "down_proj", "wo", "lin2", "ffn_output", "c_proj", "dense_4h_to_h", "fc_out", "w2", "Wo"}
)


def add_adapters(model: PreTrainedModel, recipe: RunRecipe, new_rows: Sequence[int] = ()) -> nn.Module:
    """Wrap a base model with the recipe's adapters; everything else is frozen, but for a classifier's head.

    Adapter weights are fp32 and drawn from the recipe's seed, so they are the same on every process; biases that are
    trained are fp32 too, and so are the embedding's `new_rows`, with those of the head: peft's trainable tokens, which
    add these rows to the adapter and not a copy of the whole embedding with its moments, and leave all other rows as
    they are. UserError for a name that matches nothing in the model.
    """
    from peft import IA3Config, LoraConfig, TaskType, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

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
    if new_rows and recipe.peft_type == "ia3":
        raise UserError("peft trains new tokens beside LoRA alone, and peft_type is ia3: say peft_type: lora")
    if recipe.peft_type == "ia3":
        # as in the paper: keys, values, and what goes into the second layer of a block's feed-forward network
        second = [name for name in targets.names if name.rsplit(".", 1)[-1] in IA3_FEEDFORWARD]
        common |= {"target_modules": list(targets.names), "exclude_modules": None}
        config: Any = IA3Config(**common, feedforward_modules=second)
    else:
        check_patterns(recipe, targets)
        check_parameters(model, recipe)
        keys = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
        start: Any = recipe.init_lora_weights
        config = LoraConfig(
            **common,
            **{key: getattr(recipe, key) for key in keys},
            init_lora_weights=True if starts_from_base(start) else start,
            rank_pattern=dict(recipe.rank_pattern or {}),
            alpha_pattern=dict(recipe.alpha_pattern or {}),
            target_parameters=list(recipe.target_parameters or ()) or None,
            trainable_token_indices=_rows_by_module(model, recipe, new_rows) if new_rows else None,
        )
    try:
        with quiet_libraries(), one_thread():  # peft 0.21 uses a deprecated name of transformers 5.23
            adapted = get_peft_model(model, config)
    except ValueError as error:  # of options that peft does not combine
        raise UserError(f"peft cannot add these adapters: {first_line(error)}", reason=VALUES) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in adapted.modules():  # bias: all trains those of norms, whose kernels take one dtype for both
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        # peft's layers show the weight of the matrix below them, which stays as it is: packed, or in 16 bits
        is_norm = not isinstance(module, nn.Linear | Conv1D | BaseTunerLayer)
        if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and is_norm and bias.requires_grad:
            weight.data = weight.data.to(bias.dtype)
    keep_trained_biases(adapted)
    if starts_from_base(recipe.init_lora_weights):
        start_from_base(adapted, str(recipe.init_lora_weights), recipe.seed)
    return adapted


def _rows_by_module(model: PreTrainedModel, recipe: RunRecipe, rows: Sequence[int]) -> dict[str, list[int]]:
    """The embedding and a head of its own, each with the rows to train, as peft is told them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            f"the head of {type(model).__name__} has a bias, which peft's trainable tokens leave out: say tune: full"
        )
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        for wanted in recipe.modules_to_save or ():
            if names[id(layer)].endswith(wanted):
                raise UserError(f"modules_to_save names '{wanted}', whose new rows are trained alone: take it out")
    return {names[id(layer)]: list(rows) for layer in layers}


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
