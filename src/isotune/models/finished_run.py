"""A finished run read again: what it is, whether its files are whole, and its model ready for inference."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from isotune.data.sources.hub import first_line, hub_answers, is_hub_id
from isotune.io.errors import UserError
from isotune.models.log_control import quiet_libraries
from isotune.models.opening import kept_whole

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class FinishedRun:
    """Where the parts of a run lie.

    Attributes:
        folder: RUN.
        settings: RUN/recipe.yaml.
        model: RUN/model, a whole model or an adapter.
        base: folder or Hub id of the adapter's base model; None where RUN/model is whole.
        base_made_here: the base is RUN/base_model, which the run itself wrote.
    """

    folder: Path
    settings: dict[str, Any]
    model: Path
    base: str | None
    base_made_here: bool

    @property
    def is_adapter(self) -> bool:
        """Whether RUN/model needs a base model."""
        return self.base is not None

    @property
    def training_dtype(self) -> torch.dtype:
        """The type in which the run multiplied its matrices."""
        if self.settings.get("bf16"):
            return torch.bfloat16
        return torch.float16 if self.settings.get("fp16") else torch.float32


def read_run(run_dir: str | Path) -> FinishedRun:
    """Find the parts of a finished run and see that its weight files are whole.

    Raises:
        UserError: the folder is no run, has no model, or a safetensors file is broken.
    """
    folder = Path(run_dir).expanduser()
    recipe = folder / "recipe.yaml"
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    if not recipe.is_file():
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml")
    try:
        settings = yaml.safe_load(recipe.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe} is not readable as YAML: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{recipe} is no recipe: it holds no keys")
    model = folder / "model"
    if not model.is_dir():
        found = sorted(path.name for path in folder.glob("checkpoints/step-*"))
        hint = f"; {folder / 'checkpoints' / found[-1]} is its last checkpoint" if found else ""
        raise UserError(f"the run {folder} has no model: {model} is missing, so its training has not finished{hint}")
    base, made_here = _find_base(folder, model, settings) if (model / ADAPTER_CONFIG).is_file() else (None, False)
    check_weights(model, ADAPTER_WEIGHTS if base is not None else None)
    if made_here:
        check_weights(Path(str(base)))
    return FinishedRun(folder, settings, model, base, made_here)


def check_weights(folder: Path, needed: str | None = None) -> None:
    """Open every safetensors file of a folder, so that a broken one is named before minutes are spent.

    Raises:
        UserError: there is no such file, `needed` is not among them, or one is truncated.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or (needed is not None and folder / needed not in files):
        raise UserError(f"{folder} holds no {needed or '.safetensors file'}, and weights are read from nothing else")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a whole safetensors file: {first_line(error)}") from error


def load_run_tokenizer(run: FinishedRun) -> Any:
    """The tokenizer that the run saved with its model.

    Raises:
        UserError: it is missing or unreadable.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(str(run.model), local_files_only=True)
    except LOADING_ERRORS as error:
        raise UserError(f"the tokenizer in {run.model} cannot be loaded: {first_line(error)}") from error


def load_run_model(run: FinishedRun, device: torch.device) -> Any:
    """The model of a run as it was trained, on `device` and ready for inference.

    An adapter comes as a `PeftModel` on its base: in the run's precision, and on a GPU in 4 bits where it was trained
    so. The CPU's 4-bit kernel takes only widths that are multiples of 64 and rounds to bf16, so there the same weights
    are dequantised.

    Raises:
        UserError: weights that are missing, broken or of another model.
    """
    if not run.is_adapter:
        return load_weights(str(run.model), dtype="auto").to(device).eval()
    return add_run_adapter(run, load_run_base(run, device, dequantised=device.type == "cpu")).eval()


def load_run_base(run: FinishedRun, device: torch.device, *, dequantised: bool, **kind: Any) -> Any:
    """The base of a run's adapter, with the weights that the adapter was trained on top of.

    Args:
        run: of an adapter.
        device: where the base goes.
        dequantised: give a base that was trained in 4 bits as the numbers that those bits stand for.
        kind: `auto`, `may_lack` and `config` of `load_weights`.

    Raises:
        UserError: it cannot be loaded whole.
    """
    if run.base_made_here:
        return load_weights(str(run.base), dtype="auto", **kind).to(device)
    if run.settings.get("tune") != "qlora":
        return load_weights(str(run.base), dtype=run.training_dtype, **kind).to(device)
    four_bit = _four_bit(run, kind.get("may_lack", ()))
    with quiet_libraries():
        base = load_weights(
            str(run.base), dtype=run.training_dtype, quantization_config=four_bit, device_map={"": device}, **kind
        )
        return base.dequantize() if dequantised else base


def load_weights(name: str, *, auto: Any = None, may_lack: Sequence[str] = (), **how: Any) -> Any:
    """A model of a folder or the Hub, refused where a tensor is missing.

    Args:
        name: of the folder, or its Hub id.
        auto: transformers' auto class of the model; a causal language model where not given.
        may_lack: modules whose weights come from elsewhere.
        how: of `from_pretrained`.

    Raises:
        UserError: it cannot be loaded whole.
    """
    from transformers import AutoModelForCausalLM

    auto = auto or AutoModelForCausalLM
    _check_reachable(name)
    if os.path.isdir(name) and list(Path(name).glob("*.safetensors")):
        check_weights(Path(name))
        how["use_safetensors"] = True
    try:
        with quiet_libraries():
            loading: Any = auto.from_pretrained(name, output_loading_info=True, **how)
            model, loaded = loading
    except LOADING_ERRORS as error:
        raise UserError(f"the weights of {name} cannot be loaded: {first_line(error)}") from error
    missing = sorted(key for key in loaded["missing_keys"] if not set(key.split(".")) & set(may_lack))
    if missing:
        raise UserError(f"the weights of {name} lack {len(missing)} tensors of {type(model).__name__}: {missing[0]}")
    return model


def add_run_adapter(run: FinishedRun, base: Any) -> Any:
    """The run's adapter on top of a loaded base, as a `PeftModel`.

    Raises:
        UserError: the adapter does not fit the base.
    """
    try:
        with quiet_libraries():
            from peft import PeftModel

            return PeftModel.from_pretrained(base, str(run.model), torch_device=str(base.device))
    except (*LOADING_ERRORS, TypeError) as error:
        raise UserError(f"the adapter in {run.model} does not fit its base {run.base}: {first_line(error)}") from error


def _find_base(folder: Path, model: Path, settings: dict[str, Any]) -> tuple[str, bool]:
    """The base of an adapter: the one that the run wrote, else what its configuration names, else its recipe."""
    own = folder / "base_model"
    if own.is_dir():
        return str(own), True
    try:
        named = json.loads((model / ADAPTER_CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{model / ADAPTER_CONFIG} is not readable as JSON: {first_line(error)}") from error
    named = named or settings.get("model_name_or_path")
    if not named:
        raise UserError(f"{model / ADAPTER_CONFIG} names no base model, and neither does {folder / 'recipe.yaml'}")
    places = [Path(named).expanduser(), folder / named, model / named]
    found = next((place for place in places if place.is_dir()), None)
    if found is None and not is_hub_id(named):
        raise UserError(f"the base model of the adapter in {model} is not where it was: there is no folder {named}")
    return str(found or named), False


def _check_reachable(name: str) -> None:
    if os.path.isdir(name):
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if constants.HF_HUB_OFFLINE or not hub_answers():
        raise UserError(
            f"the model {name} is on the Hugging Face Hub, which is out of reach, and not in its local cache"
        )


def _four_bit(run: FinishedRun, whole: Sequence[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=run.settings.get("bnb_4bit_quant_type", "nf4"),
        bnb_4bit_use_double_quant=run.settings.get("bnb_4bit_use_double_quant", True),
        bnb_4bit_compute_dtype=run.training_dtype,
        llm_int8_skip_modules=kept_whole(whole),
    )
