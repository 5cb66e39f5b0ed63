"""The model and tokenizer of a finished run, for inference, evaluation and export."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from isotune.data.sources.hub import is_hub_id
from isotune.io.errors import UserError, first_line
from isotune.models.heads import head_of
from isotune.models.log_control import quiet_libraries
from isotune.models.opening.pretrained import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LOADING_ERRORS,
    check_weights,
    four_bit_config,
    load_pretrained,
    load_pretrained_config,
    load_pretrained_tokenizer,
)


@dataclass(frozen=True)
class FinishedRun:
    """The parts of a finished run.

    Attributes:
        folder: RUN.
        settings: content of RUN/recipe.yaml.
        model: RUN/model, a whole model or an adapter.
        base: folder or Hub id of the adapter's base model; None where RUN/model is a whole model.
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
        """Dtype of matrix products in training."""
        if self.settings.get("bf16"):
            return torch.bfloat16
        return torch.float16 if self.settings.get("fp16") else torch.float32


def read_run(run_dir: str | Path) -> FinishedRun:
    """Find the parts of a finished run and check that its weight files are complete.

    Raises:
        UserError: the folder is not a run, has no model, or a safetensors file is broken.
    """
    folder = Path(run_dir).expanduser()
    recipe = folder / "recipe.yaml"
    if not folder.is_dir():
        raise UserError(f"there is no run directory {folder}")
    if not recipe.is_file():
        raise UserError(f"{folder} is not a run directory: it has no recipe.yaml")
    try:
        settings = yaml.safe_load(recipe.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe} is not readable as YAML: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{recipe} is not a recipe: it has no keys")
    model = folder / "model"
    if not model.is_dir():
        checkpoints = sorted(path.name for path in folder.glob("checkpoints/step-*"))
        hint = f"; {folder / 'checkpoints' / checkpoints[-1]} is its last checkpoint" if checkpoints else ""
        raise UserError(f"the run {folder} has no model: {model} is missing, so its training has not finished{hint}")
    base, made_here = _find_base(folder, model, settings) if (model / ADAPTER_CONFIG).is_file() else (None, False)
    check_weights(model, ADAPTER_WEIGHTS if base is not None else None)
    if made_here:
        check_weights(Path(str(base)))
    return FinishedRun(folder, settings, model, base, made_here)


def is_classifier(run: FinishedRun) -> bool:
    """Whether RUN/model classifies sequences, by its own configuration.

    Raises:
        UserError: the configuration is unreadable.
    """
    config = _read_json(run.model / (ADAPTER_CONFIG if run.is_adapter else "config.json"))
    if run.is_adapter:
        return config.get("task_type") == "SEQ_CLS"
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def load_run_tokenizer(run: FinishedRun) -> Any:
    """The tokenizer that the run saved with its model.

    Raises:
        UserError: it is missing or unreadable.
    """
    return load_pretrained_tokenizer(str(run.model), local_files_only=True)


def load_run_model(run: FinishedRun, device: torch.device) -> Any:
    """The causal language model of a run as it was trained, on `device`, in evaluation mode.

    An adapter is returned as a `PeftModel` on its base: in the run's precision, and on a GPU in 4 bits where it was
    trained so. The CPU's 4-bit kernel takes only widths that are multiples of 64 and rounds to bf16, so there the same
    weights are dequantized.

    Raises:
        UserError: weights that are missing, broken or of another model, or the run of a classifier.
    """
    if is_classifier(run):
        raise UserError(f"{run.folder} is the run of a classifier: eval/classify.py evaluates it")
    if not run.is_adapter:
        return load_whole_model(run).to(device).eval()
    return add_run_adapter(run, load_run_base(run, device, dequantize=device.type == "cpu")).eval()


def load_whole_model(run: FinishedRun, dtype: torch.dtype | str = "auto") -> Any:
    """The model of a run without an adapter, by default in the dtype of its files.

    Raises:
        UserError: it cannot be loaded completely.
    """
    assert not run.is_adapter
    auto = AutoModelForSequenceClassification if is_classifier(run) else AutoModelForCausalLM
    return load_pretrained(str(run.model), auto=auto, dtype=dtype)


def load_run_base(run: FinishedRun, device: torch.device, *, dequantize: bool) -> Any:
    """The base of a run's adapter, with the weights that the adapter was trained on.

    A classifier's base has a head of the adapter's size, whose weights the adapter brings.

    Args:
        run: of an adapter.
        device: of the base.
        dequantize: return a base that was trained in 4 bits as the values that those bits stand for.

    Raises:
        UserError: it cannot be loaded completely, or a classifier's adapter has no head.
    """
    name, kwargs = str(run.base), _base_arguments(run)
    if run.base_made_here:
        return load_pretrained(name, dtype="auto", **kwargs).to(device)
    if run.settings.get("tune") != "qlora":
        return load_pretrained(name, dtype=run.training_dtype, **kwargs).to(device)
    quantization = four_bit_config(
        quant_type=run.settings.get("bnb_4bit_quant_type", "nf4"),
        double_quant=run.settings.get("bnb_4bit_use_double_quant", True),
        compute_dtype=run.training_dtype,
        whole_modules=kwargs.get("may_lack", ()),
    )
    with quiet_libraries():
        base = load_pretrained(
            name, dtype=run.training_dtype, quantization_config=quantization, device_map={"": device}, **kwargs
        )
        return base.dequantize() if dequantize else base


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


def _base_arguments(run: FinishedRun) -> dict[str, Any]:
    if not is_classifier(run):
        return {"auto": AutoModelForCausalLM}
    config = load_pretrained_config(str(run.base), "the base model")
    head = head_of(config)
    config.num_labels = _adapter_classes(run.model / ADAPTER_WEIGHTS, head)
    return {"auto": AutoModelForSequenceClassification, "config": config, "may_lack": head}


def _adapter_classes(file: Path, head: Sequence[str]) -> int:
    """Classes of an adapter's head: its last matrix is the one with the fewest rows."""
    with safe_open(str(file), framework="pt") as tensors:
        names = [name for name in tensors.keys() if set(name.split(".")) & set(head) and "lora_" not in name]  # noqa: SIM118
        shapes = [tensors.get_slice(name).get_shape() for name in names]
    if not any(len(shape) == 2 for shape in shapes):
        raise UserError(f"{file} has no classification head ({' or '.join(head)})")
    return min(shape[0] for shape in shapes if len(shape) == 2)


def _find_base(folder: Path, model: Path, settings: dict[str, Any]) -> tuple[str, bool]:
    """Base of an adapter (RUN/base_model, or as its configuration or the recipe names it); whether the run wrote it."""
    own = folder / "base_model"
    if own.is_dir():
        return str(own), True
    named = _read_json(model / ADAPTER_CONFIG).get("base_model_name_or_path") or settings.get("model_name_or_path")
    if not named:
        raise UserError(f"{model / ADAPTER_CONFIG} names no base model, and neither does {folder / 'recipe.yaml'}")
    candidates = [Path(named).expanduser(), folder / named, model / named]
    existing = next((path for path in candidates if path.is_dir()), None)
    if existing is None and not is_hub_id(named):
        raise UserError(f"the base model of the adapter in {model} is not where it was: there is no folder {named}")
    return str(existing or named), False


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} cannot be read as JSON: it holds no keys")
    return content
