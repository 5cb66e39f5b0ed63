"""What a recipe's model weighs, known from its configuration alone: it is built on the meta device, empty."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.trainer_pt_utils import get_parameter_names

from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.models.classifier import install_classification
from isotune.models.heads import head_of
from isotune.models.lora import add_adapters
from isotune.models.opening import weights_dtype, whole_models
from isotune.models.packed_attention import set_packed_attention
from isotune.models.supervised_loss import install_supervised_loss

# bitsandbytes' block sizes: one scale for 64 weights; with double quantisation a byte each, and fp32 for 256 of them
_WEIGHTS_PER_SCALE, _SCALES_PER_BLOCK = 64, 256
_NORMS = (nn.LayerNorm,)


@dataclass(frozen=True)
class Parameter:
    """One tensor: its numbers, its rows (the first dimension), bytes in memory, and whether training changes it.

    Attributes:
        in_block: of one of the model's blocks, not of what stands before and after them.
    """

    numbers: int
    rows: int
    bytes: int
    trained: bool
    decayed: bool
    in_block: bool


@dataclass(frozen=True)
class ModelStats:
    """A model ready for training.

    Attributes:
        parameters: every tensor once, tied ones too.
        linear_numbers: weights of the linear layers inside the blocks and around them, without the head.
        head_numbers: weights of the output head.
        adapter_numbers: weights of LoRA.
        largest_block_bytes: weights of the largest block, which a sharded engine gathers whole.
    """

    parameters: tuple[Parameter, ...]
    layers: int
    hidden_size: int
    heads: int
    vocabulary: int
    linear_numbers: int
    head_numbers: int
    adapter_numbers: int
    largest_block_bytes: int

    @property
    def numbers(self) -> int:
        """All parameters."""
        return sum(p.numbers for p in self.parameters)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(p.numbers for p in self.parameters if p.trained)

    @property
    def block_numbers(self) -> int:
        """Of all blocks together."""
        return sum(p.numbers for p in self.parameters if p.in_block)

    @property
    def block_bytes(self) -> int:
        """Of all blocks together."""
        return sum(p.bytes for p in self.parameters if p.in_block)

    @property
    def bytes(self) -> int:
        """All weights in memory, on a process that holds them whole."""
        return sum(p.bytes for p in self.parameters)


def builder(recipe: RunRecipe, config: PreTrainedConfig, num_labels: int | None = None) -> Callable[[int], nn.Module]:
    """A function that builds the recipe's model with a given number of blocks on the meta device, adapters in place."""
    name = _layers_key(config)

    def build(layers: int) -> nn.Module:
        smaller = copy.deepcopy(config)
        setattr(smaller, name, layers)
        if getattr(smaller, "layer_types", None):
            smaller.layer_types = smaller.layer_types[:layers]
        # under ZeRO-3 transformers would fill the weights in shares, and a model without weights has none
        with whole_models(), torch.device("meta"):
            if isinstance(recipe, ClassificationRecipe):
                smaller.num_labels = num_labels or recipe.num_labels or 2
                base: Any = AutoModelForSequenceClassification.from_config(smaller, dtype=weights_dtype(recipe))
                install_classification(base)
                head = head_of(smaller)
            else:
                base = AutoModelForCausalLM.from_config(smaller, dtype=weights_dtype(recipe))
                set_packed_attention(base)
                install_supervised_loss(base)
                head = []
            return base if recipe.tune == "full" else add_adapters(base, recipe, head=head)

    return build


def model_facts(recipe: RunRecipe, config: PreTrainedConfig, model: nn.Module) -> ModelStats:
    """Count the parameters of a model that `builder` made."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = base.get_output_embeddings() if isinstance(recipe, Recipe) else None
    decayed = set(get_parameter_names(model, list(_NORMS), ["bias", "layernorm", "rmsnorm"]))
    four_bit = _four_bit_weights(recipe, model, head)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == _layers(config)]
    blocks = list(lists[0]) if lists else []
    block = max((sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks), default=0)
    in_blocks = {id(p) for b in blocks for p in b.parameters()}
    kept: list[Parameter] = []
    linear = adapters = 0
    for name, parameter in model.named_parameters():
        numbers = parameter.numel()
        size = _four_bit_bytes(recipe, numbers) if id(parameter) in four_bit else numbers * parameter.element_size()
        in_block = id(parameter) in in_blocks
        kept.append(Parameter(numbers, parameter.shape[0], size, parameter.requires_grad, name in decayed, in_block))
        adapters += numbers if "lora_" in name else 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name:
            linear += module.weight.numel()
    return ModelStats(
        parameters=tuple(kept),
        layers=_layers(config),
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        linear_numbers=linear,
        head_numbers=0 if head is None else head.weight.numel(),
        adapter_numbers=adapters,
        largest_block_bytes=block,
    )


def _layers_key(config: PreTrainedConfig) -> str:
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def _layers(config: PreTrainedConfig) -> int:
    return int(config.num_hidden_layers)


def _four_bit_weights(recipe: RunRecipe, model: nn.Module, head: nn.Module | None) -> set[int]:
    """Weights that QLoRA quantises: those of frozen linear layers, but for the head."""
    if recipe.tune != "qlora":
        return set()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n and m is not head}
    return {id(m.weight) for m in layers.values() if not m.weight.requires_grad}


def _four_bit_bytes(recipe: RunRecipe, numbers: int) -> int:
    scales = -(-numbers // _WEIGHTS_PER_SCALE)
    if recipe.bnb_4bit_use_double_quant:
        return -(-numbers // 2) + scales + 4 * -(-scales // _SCALES_PER_BLOCK)
    return -(-numbers // 2) + 4 * scales
