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
