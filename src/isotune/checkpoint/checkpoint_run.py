"""A run directory out of a checkpoint of any engine, as if the run had ended there, for everything that reads runs.

One process does it, whatever the engine and the number of ranks that wrote the checkpoint.
"""

import contextlib
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from isotune.checkpoint.engine_state import MODEL
from isotune.checkpoint.final_model import save_and_verify
from isotune.checkpoint.flat_tensors import read_whole, stored
from isotune.checkpoint.manifest import MANIFEST, InvalidCheckpoint
from isotune.checkpoint.store import find_checkpoint
from isotune.checkpoint.writer import TENSORS
from isotune.config import ClassificationRecipe, RunRecipe, kind_of
from isotune.io.errors import RunFault, UserError
from isotune.models.log_control import quiet_libraries
from isotune.models.lora import add_adapters, head_of
from isotune.models.opening import is_made_here, load_base_model, load_config, load_tokenizer

_NAME = re.compile(r"step-\d{8,}")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, valid or not."""
    return (folder / MANIFEST).is_file() or _NAME.fullmatch(folder.name) is not None


def write_run_of(checkpoint: Path, scratch: Path) -> None:
    """Write recipe.yaml and model/ into `scratch`, as if the run had ended at the checkpoint.

    A base of an adapter that was drawn at random is written to RUN/base_model, as the run itself would do.

    Raises:
        UserError: the checkpoint is not valid, or the model of its recipe cannot be loaded.
    """
    try:
        manifest = find_checkpoint(checkpoint)
    except InvalidCheckpoint as why:
        raise UserError(f"{checkpoint} is not a valid checkpoint: {why}") from why
    recipe = kind_of(manifest.recipe).from_values(**manifest.recipe, output_dir=str(scratch))
    tokenizer = load_tokenizer(recipe, needed=("pad",))
    config = _config_of(recipe, checkpoint / TENSORS)
    model = _model_with(recipe, config, checkpoint / TENSORS)
    if recipe.tune != "full":
        base = recipe.model_name_or_path
        if is_made_here(recipe):
            folder = checkpoint.resolve().parents[1] / "base_model"
            if not folder.is_dir():
                save_and_verify(load_base_model(recipe, config, torch.device("cpu")), tokenizer, folder)
            base = str(folder)
        model.peft_config["default"].base_model_name_or_path = base
    save_and_verify(model, tokenizer, scratch / "model")
    recipe.write(scratch / "recipe.yaml")


def _config_of(recipe: RunRecipe, tensors: Path) -> PreTrainedConfig:
    """The model's configuration; a classifier has as many classes as its head's last bias has elements."""
    config = load_config(recipe)
    if isinstance(recipe, ClassificationRecipe):
        heads = set(head_of(config))
        lengths = [
            length
            for name, (length, _) in stored(tensors).items()
            if name.startswith(MODEL) and name.endswith(".bias") and heads & set(name.removeprefix(MODEL).split("."))
        ]
        if not lengths:
            raise RunFault(f"the checkpoint holds no classification head ({' or '.join(sorted(heads))})")
        config.num_labels = min(lengths)
    return config


def _meta_model(recipe: RunRecipe, config: PreTrainedConfig) -> Any:
    """The model of a recipe with its adapters, on the meta device."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

    with torch.device("meta"), quiet_libraries():
        if isinstance(recipe, ClassificationRecipe):
            base = cast(Any, AutoModelForSequenceClassification).from_config(config)
        else:
            base = cast(Any, AutoModelForCausalLM).from_config(config)
            with contextlib.suppress(OSError):  # most models have no file of it
                base.generation_config = cast(Any, GenerationConfig).from_pretrained(recipe.model_name_or_path)
        return base if recipe.tune == "full" else add_adapters(base, recipe)


def _trained_tensors(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = [name.removeprefix(MODEL) for name in stored(folder) if name.startswith(MODEL)]
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise RunFault(f"{unknown[0]} of the checkpoint has no place in the model of its recipe")
    whole = read_whole(folder, {MODEL + name: shapes[name] for name in names})
    return {name.removeprefix(MODEL): tensor for name, tensor in whole.items()}


def _model_with(recipe: RunRecipe, config: PreTrainedConfig, folder: Path) -> Any:
    model = _meta_model(recipe, config)
    tensors = _trained_tensors(model, folder)
    model.load_state_dict(tensors, strict=False, assign=True)
    if recipe.tune == "full":
        model.tie_weights()
        absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if absent:
            raise RunFault(f"{absent[0]} of the model is not in the checkpoint")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tensors)
    return model
