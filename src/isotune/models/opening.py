"""Models and tokenizers by name, with every way in which a name or a file can be wrong said in one sentence."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from isotune.config import RunRecipe
from isotune.data.sources.builtin import PREFIX
from isotune.data.sources.hub import first_line, hub_answers, is_hub_id
from isotune.io.errors import UserError
from isotune.models.builtin_models import builtin_config, builtin_tokenizer
from isotune.models.log_control import quiet_libraries
from isotune.models.packed_attention import POSITIONS_AFTER_PADDING

OFFLINE_WAYS = "a local folder that holds the model, `builtin:NAME`, or a copy in the Hub cache"


def compute_dtype(recipe: RunRecipe) -> torch.dtype:
    """The type of matrix products that the recipe asks for."""
    return torch.bfloat16 if recipe.bf16 else torch.float16 if recipe.fp16 else torch.float32


def weights_dtype(recipe: RunRecipe) -> torch.dtype:
    """The type in which the base model's weights lie.

    Trained weights stay in fp32 (autocast computes in 16 bits from them); frozen ones are never updated, so they lie
    in the compute type and cost half the memory and no casts.
    """
    return torch.float32 if recipe.tune == "full" else compute_dtype(recipe)


def load_tokenizer(recipe: RunRecipe, needed: Sequence[str] = ("eos", "pad")) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe; refused without the special tokens that are `needed`, by default eos and pad.

    Raises:
        UserError: no such tokenizer, or one that lacks them.
    """
    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    if name.startswith(PREFIX):
        return builtin_tokenizer(name)
    _check_reachable(name, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer '{name}' cannot be loaded: {first_line(error)}") from error
    if not tokenizer.encode("a", add_special_tokens=False):
        # transformers makes an empty one of some kinds where the files are missing
        raise UserError(f"tokenizer '{name}' makes no token of a letter: is its tokenizer.json there?")
    for role in needed:
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise UserError(
                f"the tokenizer of '{name}' has no {role} token: add `{role}_token` to its tokenizer_config.json"
            )
    return tokenizer


def load_config(recipe: RunRecipe) -> PreTrainedConfig:
    """The model's configuration, checked against the recipe's `max_seq_length`.

    Raises:
        UserError: no such model, or rows longer than the model has positions for.
    """
    name = recipe.model_name_or_path
    if name.startswith(PREFIX):
        config = builtin_config(name)
    else:
        _check_reachable(name, "model")
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"model_name_or_path '{name}' cannot be loaded: {first_line(error)}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    if positions is not None and recipe.max_seq_length > positions:
        raise UserError(
            f"max_seq_length {recipe.max_seq_length} is beyond the {positions} positions of '{name}': "
            f"lower max_seq_length to {positions} or less"
        )
    return config


def is_made_here(recipe: RunRecipe) -> bool:
    """Whether the base model's weights are drawn from the seed, and so exist in no file."""
    return recipe.model_init == "random" or recipe.model_name_or_path.startswith(PREFIX)


def load_causal_lm(recipe: RunRecipe, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """The base model of an instruction-tuning recipe; see `load_base`."""
    return load_base(recipe, config, device, AutoModelForCausalLM)


def load_base(
    recipe: RunRecipe, config: PreTrainedConfig, device: torch.device, auto: Any, may_be_new: Sequence[str] = ()
) -> PreTrainedModel:
    """The base model of a recipe on `device`, before adapters.

    Args:
        recipe: says what to load, from where and in which precision.
        config: what `load_config` returned.
        device: of this rank; 4-bit weights are quantised right there.
        auto: transformers' auto class of the model.
        may_be_new: modules whose weights a file may lack; they are drawn from the recipe's seed then.

    Raises:
        UserError: unreadable or incomplete weights, or a device that cannot hold 4-bit weights.
    """
    if is_made_here(recipe):
        torch.manual_seed(recipe.seed)
        with whole_weights():
            model = auto.from_config(config, dtype=torch.float32)
        return model.to(device=device, dtype=weights_dtype(recipe))
    if recipe.tune == "qlora":
        how = {"quantization_config": _four_bit(recipe, device, may_be_new), "device_map": {"": device}}
        with whole_weights():
            return _keep_trainable(_from_pretrained(recipe, config, auto, may_be_new, **how))
    if may_be_new:
        torch.manual_seed(recipe.seed)
        with whole_weights():
            return _from_pretrained(recipe, config, auto, may_be_new).to(device)  # type: ignore[arg-type]
    return _from_pretrained(recipe, config, auto).to(device)  # type: ignore[arg-type]


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within it a model is made whole under ZeRO-3 too; the engine shards it when it is prepared.

    transformers 5.23 would draw random weights in shares, each by itself, and cannot place 4-bit ones.
    """
    from transformers.integrations import deepspeed as integration

    announced = integration._hf_deepspeed_config_weak_ref
    load_whole_models()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = announced


def load_whole_models() -> None:
    """From here on a model that is loaded is whole, on the rank that loads it: transformers forgets about ZeRO-3."""
    from transformers.integrations import deepspeed as integration

    integration.unset_hf_deepspeed_config()


def kept_whole(modules: Sequence[str]) -> list[str] | None:
    """BitsAndBytesConfig's `llm_int8_skip_modules`, for 4 bits too: modules of these names, wherever they stand.

    None leaves it to transformers 5.23, which knows output layers and nothing of a pooler. What is trained whole, such
    as a classifier's head, must not be quantised.
    """
    return [rf"(.*\.)?{name}" for name in modules] or None


def _four_bit(recipe: RunRecipe, device: torch.device, whole: Sequence[str]) -> Any:
    try:
        import bitsandbytes  # noqa: F401  (slow to import, and only QLoRA needs it)
    except Exception as error:
        raise UserError(f"tune: qlora needs bitsandbytes, which cannot be loaded: {first_line(error)}") from error
    if device.type not in ("cuda", "cpu", "xpu"):
        raise UserError(f"tune: qlora cannot run on a {device.type} device: use tune: lora")
    if recipe.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bf16: say bf16: false and fp16: true for tune: qlora")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=recipe.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype(recipe),
        # a sharded engine can only flatten 4-bit weights together with others of the same storage type
        bnb_4bit_quant_storage=compute_dtype(recipe),
        llm_int8_skip_modules=kept_whole(whole),
    )


def _keep_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """bitsandbytes 0.50 repacks 4-bit weights on CPU at the first evaluation, for a kernel that cannot be trained."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def _from_pretrained(
    recipe: RunRecipe, config: PreTrainedConfig, auto: Any, may_be_new: Sequence[str] = (), **how: Any
) -> PreTrainedModel:
    name = recipe.model_name_or_path
    _check_weight_files(Path(name))
    try:
        with quiet_libraries():
            model, loaded = auto.from_pretrained(
                name, config=config, dtype=weights_dtype(recipe), output_loading_info=True, **how
            )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights of '{name}' cannot be loaded: {first_line(error)}") from error
    missing = sorted(key for key in loaded["missing_keys"] if not set(key.split(".")) & set(may_be_new))
    if missing:
        raise UserError(
            f"the weights of '{name}' lack {len(missing)} tensors of {type(model).__name__}, {missing[0]} first: "
            "training would start them at random"
        )
    return model


def _check_weight_files(folder: Path) -> None:
    """Open every safetensors file of a local model, so that a truncated one is named before minutes are spent."""
    if not folder.is_dir():
        return
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a whole safetensors file: {first_line(error)}") from error


def _check_reachable(name: str, what: str) -> None:
    """Fail at once where a Hub name cannot be reached, instead of half way in."""
    if os.path.isdir(name):
        return
    if not is_hub_id(name):
        raise UserError(f"the {what} folder '{name}' does not exist")
    if hub_answers():
        return
    from huggingface_hub import try_to_load_from_cache

    cached = "config.json" if what == "model" else "tokenizer_config.json"
    if not isinstance(try_to_load_from_cache(name, cached), str):
        raise UserError(f"the {what} '{name}' is on the Hugging Face Hub, which cannot be reached: give {OFFLINE_WAYS}")
    os.environ["HF_HUB_OFFLINE"] = "1"
