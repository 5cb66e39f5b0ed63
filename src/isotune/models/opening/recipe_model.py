"""The base model and tokenizer of a recipe."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from isotune.compat.bitsandbytes import keep_trainable
from isotune.compat.deepspeed import whole_models
from isotune.config import ClassificationRecipe, RunRecipe
from isotune.data.sources.source import PREFIX
from isotune.io.errors import UserError, first_line
from isotune.models.builtin_models import builtin_config, builtin_tokenizer
from isotune.models.heads import head_of
from isotune.models.opening.pretrained import (
    four_bit_config,
    load_pretrained,
    load_pretrained_config,
    load_pretrained_tokenizer,
)
from isotune.models.packed_attention import max_positions


def compute_dtype(recipe: RunRecipe) -> torch.dtype:
    """Dtype of matrix products."""
    return torch.bfloat16 if recipe.bf16 else torch.float16 if recipe.fp16 else torch.float32


def weights_dtype(recipe: RunRecipe) -> torch.dtype:
    """Dtype of the base model's weights.

    Trained weights stay in fp32, and autocast computes in 16 bits from them. Frozen weights are never updated, so they
    are kept in the compute dtype, which takes half the memory and no casts.
    """
    return torch.float32 if recipe.tune == "full" else compute_dtype(recipe)


def load_tokenizer(recipe: RunRecipe, needed: Sequence[str] = ("eos", "pad")) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe.

    Args:
        recipe: names the tokenizer, or else the model.
        needed: special tokens that it must have.

    Raises:
        UserError: no such tokenizer, or it lacks a special token.
    """
    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    if name.startswith(PREFIX):
        return builtin_tokenizer(name)
    tokenizer: PreTrainedTokenizerBase = load_pretrained_tokenizer(name, use_fast=True)
    if not tokenizer.encode("a", add_special_tokens=False):
        # transformers makes an empty one of some kinds where the files are missing
        raise UserError(f"tokenizer '{name}' encodes a letter to no token: is its tokenizer.json there?")
    for role in needed:
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise UserError(
                f"the tokenizer of '{name}' has no {role} token: add `{role}_token` to its tokenizer_config.json"
            )
    return tokenizer


def load_config(recipe: RunRecipe) -> PreTrainedConfig:
    """The model's configuration, checked against the recipe's `max_seq_length`.

    Raises:
        UserError: no such model, or it has fewer positions than `max_seq_length`.
    """
    name = recipe.model_name_or_path
    config = builtin_config(name) if name.startswith(PREFIX) else load_pretrained_config(name, "model_name_or_path")
    positions = max_positions(config)
    if positions is not None and recipe.max_seq_length > positions:
        raise UserError(
            f"max_seq_length {recipe.max_seq_length} is beyond the {positions} positions of '{name}': "
            f"lower max_seq_length to {positions} or less"
        )
    return config


def is_made_here(recipe: RunRecipe) -> bool:
    """Whether the base model's weights are drawn from the seed, and so are in no file."""
    return recipe.model_init == "random" or recipe.model_name_or_path.startswith(PREFIX)


def load_base_model(recipe: RunRecipe, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """The base model of a recipe on `device`, before adapters: a causal LM or a classifier, by the recipe's type.

    A classifier has a head for `config.num_labels` classes; a head that is in no file is drawn from the recipe's seed.

    Args:
        recipe: says what to load, from where and in which precision.
        config: what `load_config` returned.
        device: of this rank; 4-bit weights are quantized on it.

    Raises:
        UserError: unreadable or incomplete weights, a model type without a classifier, or a device that cannot hold
            4-bit weights.
    """
    auto, new_modules = AutoModelForCausalLM, list[str]()
    if isinstance(recipe, ClassificationRecipe):
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(f"model type '{config.model_type}' has no classifier in transformers: choose an encoder")
        auto, new_modules = AutoModelForSequenceClassification, head_of(config)
    if is_made_here(recipe):
        torch.manual_seed(recipe.seed)
        with whole_models():
            model: Any = auto.from_config(config, dtype=torch.float32)
        return model.to(device=device, dtype=weights_dtype(recipe))
    kwargs = {"auto": auto, "may_lack": new_modules, "config": config, "dtype": weights_dtype(recipe)}
    if recipe.tune == "qlora":
        quantization = _four_bit(recipe, device, new_modules)
        with whole_models():
            model = load_pretrained(
                recipe.model_name_or_path, quantization_config=quantization, device_map={"": device}, **kwargs
            )
        keep_trainable(model)
        return model
    if new_modules:
        torch.manual_seed(recipe.seed)
    with whole_models() if new_modules else contextlib.nullcontext():
        return load_pretrained(recipe.model_name_or_path, **kwargs).to(device)


def _four_bit(recipe: RunRecipe, device: torch.device, whole_modules: Sequence[str]) -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401  (slow to import, and only QLoRA needs it)
    except Exception as error:
        raise UserError(f"tune: qlora needs bitsandbytes, which cannot be loaded: {first_line(error)}") from error
    if device.type not in ("cuda", "cpu", "xpu"):
        raise UserError(f"tune: qlora cannot run on a {device.type} device: use tune: lora")
    if recipe.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bf16: say bf16: false and fp16: true for tune: qlora")
    return four_bit_config(
        quant_type=recipe.bnb_4bit_quant_type,
        double_quant=recipe.bnb_4bit_use_double_quant,
        compute_dtype=compute_dtype(recipe),
        # a sharded engine flattens 4-bit weights only together with others of the same storage dtype
        storage_dtype=compute_dtype(recipe),
        whole_modules=whole_modules,
    )
