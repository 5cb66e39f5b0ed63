"""peft 0.21: how adapters are saved, and what its wrapper passes to the model."""

import re
from pathlib import Path
from typing import Any


def save_adapter(model: Any, folder: Path) -> None:
    """`save_pretrained`, with embeddings only where they are a target.

    With its default, "auto", peft asks the Hub for the base model's vocabulary size. Fully trained embeddings are in
    `modules_to_save`, which this argument does not affect.
    """
    targets = next(iter(model.peft_config.values())).target_modules or ()
    model.save_pretrained(str(folder), save_embedding_layers=bool({"embed_tokens", "lm_head"} & set(targets)))


def name_in_adapter_file(name: str) -> str:
    """Key of a PeftModel's parameter in adapter_model.safetensors, which omits the adapter's name.

    DoRA's magnitudes lose their `.weight` as well.
    """
    name = re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", name)
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def names_of_experts(model_type: str) -> frozenset[str]:
    """Names of layers that peft's LoRA takes for the experts of a type: 0.21 turns them into parameters of these.

    It does so for adapters that were made before transformers 5 put the experts' matrices together, also where layers
    beside the experts have these names, which then get no adapter.
    """
    try:
        from peft.utils import transformers_weight_conversion as library
    except ImportError:  # of another version
        return frozenset()
    pattern = getattr(library, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type)
    if not getattr(library, "_MOE_FUSED_TARGETS", {}).get(pattern):
        return frozenset()
    return frozenset(getattr(library, "_MOE_TARGET_MODULE_MAPPING", {}).get(pattern, ()))


def refused_in_mamba(model: Any, layer: str) -> bool:
    """Whether peft's LoRA takes no layer of this name in the model's type: kernels of Mamba read some weights alone."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils as library

    check = getattr(library, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(LoraConfig(), model, layer)
    except ValueError:
        return True
    return False


def given_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the caller gave: PeftModelForSequenceClassification passes its whole signature on, as None."""
    return {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}


def without_new_rows(layer: Any) -> Any:
    """The layer itself of one of which peft trains some rows (trainable_token_indices); any other as it is."""
    return layer.original_module if type(layer).__name__ == "TrainableTokensWrapper" else layer


def base_model_of(model: Any) -> Any:
    """The model of transformers inside a PeftModel; any other model itself.

    `get_base_model` is public, but torch's modules declare every unknown attribute as a Tensor or a Module.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model
