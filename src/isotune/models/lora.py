"""LoRA adapters on named target modules, whose names are checked before training, and the head beside them."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from isotune.config import ClassificationRecipe, RunRecipe
from isotune.io.errors import UserError, nearest
from isotune.models.hub_models import commit_of_base
from isotune.models.log_control import quiet_libraries

# The projections of the blocks. peft's "all-linear" would include OPT's project_in and project_out.
DEFAULT_TARGETS = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "bert": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "roberta": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "xlm-roberta": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "albert": ["query", "key", "value", "attention.dense", "ffn", "ffn_output"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# Modules of a classifier above its encoder: a file may lack them, and beside LoRA they are trained whole.
HEADS = {
    "albert": ["pooler", "classifier"],
    "bert": ["pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
}
OTHER_HEADS = ["classifier"]


def head_of(config: PreTrainedConfig) -> list[str]:
    """Names of the modules of a classifier's head; none of them is below the encoder."""
    return HEADS.get(config.model_type, OTHER_HEADS)


def add_adapters(model: PreTrainedModel, recipe: RunRecipe) -> nn.Module:
    """Wrap a base model with the recipe's LoRA adapters; everything else is frozen, but for a classifier's head.

    Adapter weights are fp32 and drawn from the recipe's seed, so they are the same on every process; biases that are
    trained are fp32 too. UserError for a target that the model does not have, and where no targets are given or known.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = _targets(model, recipe)
    head = head_of(model.config) if isinstance(recipe, ClassificationRecipe) else []
    keys = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "init_lora_weights")
    model.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
        target_modules=targets,
        modules_to_save=[*(recipe.modules_to_save or ()), *head] or None,
        revision=commit_of_base(recipe),
        **{key: getattr(recipe, key) for key in keys},
    )
    with quiet_libraries():  # peft 0.21 uses a deprecated name of transformers 5.23
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in adapted.modules():  # bias: all trains those of norms, whose kernels take one dtype for both
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and not isinstance(module, nn.Linear):
            weight.data = weight.data.to(bias.dtype)
    return adapted


def _targets(model: PreTrainedModel, recipe: RunRecipe) -> list[str]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = {name.rsplit(".", 1)[-1] for name, layer in layers.items() if layer is not model.get_output_embeddings()}
    targets = recipe.target_modules or DEFAULT_TARGETS.get(model.config.model_type)
    if not targets:
        raise UserError(
            f"target_modules is not given, and none are known for model type '{model.config.model_type}': "
            f"choose among {', '.join(sorted(linear))}"
        )
    for target in targets:
        if target not in linear and not any(name.endswith("." + target) for name in layers):
            near = nearest(target, linear)
            hint = f"did you mean '{near}'? " if near else ""
            raise UserError(
                f"target_modules names '{target}', which {type(model).__name__} does not have: {hint}"
                f"it has {', '.join(sorted(linear))}"
            )
    return list(targets)
