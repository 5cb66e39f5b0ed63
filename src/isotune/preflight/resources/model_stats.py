"""Parameter counts and bytes of a recipe's model, from its configuration alone: it is built on the meta device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.trainer_pt_utils import get_parameter_names

from isotune.compat.deepspeed import whole_models
from isotune.compat.peft import base_model_of
from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.models.classifier import install_classification
from isotune.models.lora import add_adapters
from isotune.models.opening import weights_dtype
from isotune.models.packed_attention import set_packed_attention
from isotune.models.supervised_loss import install_supervised_loss

# bitsandbytes' block sizes: an fp32 scale for 64 weights; with double quantization a byte, and fp32 for 256 scales
_WEIGHTS_PER_SCALE, _SCALES_PER_BLOCK = 64, 256


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor."""

    numel: int
    rows: int  # size of the first dimension
    bytes: int  # in memory, on a process that holds it whole
    trained: bool
    decayed: bool  # whether weight decay applies
    in_block: bool  # in a transformer block, not in the layers before and after the blocks


@dataclass(frozen=True)
class ModelStats:
    """A model as it is trained, with adapters; tied tensors count once."""

    parameters: tuple[Parameter, ...]
    numel: int
    bytes: int  # on a process that holds all weights whole
    trained_numel: int
    block_numel: int  # of all blocks together
    block_bytes: int
    layers: int
    hidden_size: int
    linear_numel: int  # weights of all linear layers except the output head
    head_numel: int  # of the output head
    adapter_numel: int  # of LoRA
    largest_block_bytes: int  # weights of the largest block, which a sharding engine gathers


def model_builder(
    recipe: RunRecipe, config: PreTrainedConfig, num_labels: int | None = None
) -> Callable[[int], nn.Module]:
    """A function that builds the recipe's model, with adapters, with a number of blocks on the meta device."""
    layers_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")

    def build(layers: int) -> nn.Module:
        smaller = copy.deepcopy(config)
        setattr(smaller, layers_key, layers)
        if getattr(smaller, "layer_types", None):
            smaller.layer_types = smaller.layer_types[:layers]
        # under ZeRO-3 transformers would shard the weights at loading, and meta tensors cannot be sharded
        with whole_models(), torch.device("meta"):
            if isinstance(recipe, ClassificationRecipe):
                smaller.num_labels = num_labels or recipe.num_labels or 2
                base: Any = AutoModelForSequenceClassification.from_config(smaller, dtype=weights_dtype(recipe))
                install_classification(base)
            else:
                base = AutoModelForCausalLM.from_config(smaller, dtype=weights_dtype(recipe))
                set_packed_attention(base)
                install_supervised_loss(base)
            return base if recipe.tune == "full" else add_adapters(base, recipe)

    return build


def model_stats(recipe: RunRecipe, config: PreTrainedConfig, num_labels: int | None = None) -> ModelStats:
    """Build the recipe's model and count its parameters."""
    model = model_builder(recipe, config, num_labels)(config.num_hidden_layers)
    head = base_model_of(model).get_output_embeddings() if isinstance(recipe, Recipe) else None
    decayed = set(get_parameter_names(model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm"]))
    modules = model.named_modules()  # the linear layers are counted without the output head and adapters
    linear = [m.weight for name, m in modules if isinstance(m, nn.Linear) and m is not head and "lora_" not in name]
    four_bit = {id(weight) for weight in linear if recipe.tune == "qlora" and not weight.requires_grad}
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    blocks = list(lists[0]) if lists else []
    block = max((sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks), default=0)
    in_blocks = {id(p) for b in blocks for p in b.parameters()}
    parameters = []
    adapter_numel = 0
    for name, p in model.named_parameters():
        numel = p.numel()
        size = _four_bit_bytes(recipe, numel) if id(p) in four_bit else numel * p.element_size()
        parameters.append(Parameter(numel, p.shape[0], size, p.requires_grad, name in decayed, id(p) in in_blocks))
        adapter_numel += numel if "lora_" in name else 0
    of_blocks = [p for p in parameters if p.in_block]
    return ModelStats(
        parameters=tuple(parameters),
        numel=sum(p.numel for p in parameters),
        bytes=sum(p.bytes for p in parameters),
        trained_numel=sum(p.numel for p in parameters if p.trained),
        block_numel=sum(p.numel for p in of_blocks),
        block_bytes=sum(p.bytes for p in of_blocks),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        linear_numel=sum(weight.numel() for weight in linear),
        head_numel=0 if head is None else head.weight.numel(),
        adapter_numel=adapter_numel,
        largest_block_bytes=block,
    )


def _four_bit_bytes(recipe: RunRecipe, numel: int) -> int:
    scales = -(-numel // _WEIGHTS_PER_SCALE)
    of_scales = scales + 4 * -(-scales // _SCALES_PER_BLOCK) if recipe.bnb_4bit_use_double_quant else 4 * scales
    return -(-numel // 2) + of_scales
