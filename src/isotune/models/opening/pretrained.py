"""Models, configurations and tokenizers by folder or Hub id; every failure is a UserError of one sentence."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig

from isotune.compat.bitsandbytes import unquantized_modules
from isotune.data.sources.hub import hub_answers, is_hub_id
from isotune.io.errors import UserError, first_line
from isotune.models.log_control import quiet_libraries

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def load_pretrained(name: str, *, auto: Any, may_lack: Sequence[str] = (), **kwargs: Any) -> Any:
    """A model with all its weights.

    Args:
        name: folder or Hub id.
        auto: transformers' auto class of the model.
        may_lack: modules whose weights may be absent.
        kwargs: of `from_pretrained`.

    Raises:
        UserError: it cannot be loaded, or other weights are absent.
    """
    check_reachable(name, "model")
    if os.path.isdir(name) and check_safetensors(Path(name)):
        kwargs["use_safetensors"] = True
    try:
        with quiet_libraries():
            model, loaded = auto.from_pretrained(name, output_loading_info=True, **kwargs)
    except LOADING_ERRORS as error:
        raise UserError(f"the weights of '{name}' cannot be loaded: {first_line(error)}") from error
    missing = sorted(key for key in loaded["missing_keys"] if not set(key.split(".")) & set(may_lack))
    if missing:
        raise UserError(
            f"the weights of '{name}' lack {len(missing)} tensors of {type(model).__name__}, {missing[0]} first: "
            "they would be random"
        )
    return model


def load_pretrained_config(name: str, key: str = "the model") -> PreTrainedConfig:
    """The configuration of a model.

    Args:
        name: folder or Hub id.
        key: what an error message calls it.

    Raises:
        UserError: there is none, or it is broken.
    """
    check_reachable(name, "model")
    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(name)
    except LOADING_ERRORS as error:
        raise UserError(f"{key} '{name}' cannot be loaded: {first_line(error)}") from error


def load_pretrained_tokenizer(name: str, **kwargs: Any) -> Any:
    """The tokenizer of a model.

    Args:
        name: folder or Hub id.
        kwargs: of `from_pretrained`.

    Raises:
        UserError: there is none, or it is broken.
    """
    check_reachable(name, "tokenizer")
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(name, **kwargs)
    except LOADING_ERRORS as error:
        raise UserError(f"the tokenizer of '{name}' cannot be loaded: {first_line(error)}") from error


def four_bit_config(
    *,
    quant_type: str,
    double_quant: bool,
    compute_dtype: torch.dtype,
    storage_dtype: torch.dtype | None = None,
    whole_modules: Sequence[str] = (),
) -> BitsAndBytesConfig:
    """How to quantize a model to 4 bits.

    Args:
        quant_type: `nf4` or `fp4`.
        double_quant: quantize the quantization constants too.
        compute_dtype: of matrix products.
        storage_dtype: of the packed weights; uint8 where not given.
        whole_modules: modules that are not quantized, such as a head that is trained whole.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage_dtype,
        llm_int8_skip_modules=unquantized_modules(whole_modules),
    )


def check_reachable(name: str, what: str) -> None:
    """Check a folder or Hub id before anything is loaded.

    Raises:
        UserError: no such folder; or a Hub id that is not in the cache while the Hub does not answer.
    """
    if os.path.isdir(name):
        return
    if not is_hub_id(name):
        raise UserError(f"the {what} folder '{name}' does not exist")
    if hub_answers():
        return
    from huggingface_hub import try_to_load_from_cache

    cached_file = "config.json" if what == "model" else "tokenizer_config.json"
    if not isinstance(try_to_load_from_cache(name, cached_file), str):
        raise UserError(
            f"the {what} '{name}' is on the Hugging Face Hub, which cannot be reached: "
            "give a local folder that holds the model, `builtin:NAME`, or a copy in the Hub cache"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"


def check_weights(folder: Path, needed: str | None = None) -> None:
    """Check that a folder has safetensors files and that they are complete.

    Raises:
        UserError: there are none, `needed` is not among them, or one is truncated.
    """
    files = check_safetensors(folder)
    if not files or (needed is not None and folder / needed not in files):
        raise UserError(f"{folder} holds no {needed or '.safetensors file'}, and weights are read from nothing else")


def check_safetensors(folder: Path) -> list[Path]:
    """The safetensors files of a folder; each is opened, so that a truncated one is named before minutes are spent.

    Raises:
        UserError: a file is truncated.
    """
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a complete safetensors file: {first_line(error)}") from error
    return files
