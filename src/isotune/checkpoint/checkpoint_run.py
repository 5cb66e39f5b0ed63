"""A checkpoint of any engine becomes the folder of a run that had ended there, so that whatever reads runs reads it.

One process does it, without the engine that wrote the checkpoint and without its number of ranks.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

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
from isotune.models.classifier import head_of, load_classifier
from isotune.models.log_control import quiet_libraries
from isotune.models.lora import add_adapters
from isotune.models.opening import is_made_here, load_causal_lm, load_config, load_tokenizer

_NAME = re.compile(r"step-\d{8,}")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, whole or not, and no run."""
    return (folder / MANIFEST).is_file() or _NAME.fullmatch(folder.name) is not None


def write_run_of(checkpoint: Path, scratch: Path) -> None:
    """Write recipe.yaml and model/ into `scratch`, as the run would have left them had it ended at the checkpoint.

    The base of an adapter that was made at random goes to RUN/base_model, where the run itself would put it.

    Raises:
        UserError: the checkpoint is not whole, or the model of its recipe cannot be read.
    """
    try:
        manifest = find_checkpoint(checkpoint)
    except InvalidCheckpoint as why:
        raise UserError(f"{checkpoint} is no whole checkpoint: {why}") from why
    recipe = kind_of(manifest.recipe).from_values(**manifest.recipe, output_dir=str(scratch))
    tokenizer = load_tokenizer(recipe, needed=("pad",))
    config = _config_of(recipe, checkpoint / TENSORS)
    model = _model_with(recipe, config, checkpoint / TENSORS)
    if recipe.tune != "full":
        base = recipe.model_name_or_path
        if is_made_here(recipe):
            folder = checkpoint.resolve().parents[1] / "base_model"
            if not folder.is_dir():
                load = load_classifier if isinstance(recipe, ClassificationRecipe) else load_causal_lm
                save_and_verify(load(recipe, config, torch.device("cpu")), tokenizer, folder)  # type: ignore[arg-type]
            base = str(folder)
        model.peft_config["default"].base_model_name_or_path = base
    save_and_verify(model, tokenizer, scratch / "model")
    recipe.write(scratch / "recipe.yaml")


def _config_of(recipe: RunRecipe, tensors: Path) -> PreTrainedConfig:
    """The model's configuration; the classes of a classifier are the biases of the last layer of its head."""
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


def _skeleton(recipe: RunRecipe, config: PreTrainedConfig) -> Any:
    """The model of a recipe, with its adapters, without memory for a single weight."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

    with torch.device("meta"), quiet_libraries():
        if isinstance(recipe, ClassificationRecipe):
            classifier = AutoModelForSequenceClassification.from_config(config)
            return classifier if recipe.tune == "full" else add_adapters(classifier, recipe, head=head_of(config))
        base = AutoModelForCausalLM.from_config(config)
        with contextlib.suppress(OSError):  # most models have none of their own
            base.generation_config = GenerationConfig.from_pretrained(recipe.model_name_or_path)
        return base if recipe.tune == "full" else add_adapters(base, recipe)


def _trained_tensors(skeleton: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    names = [name.removeprefix(MODEL) for name in stored(folder) if name.startswith(MODEL)]
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise RunFault(f"{unknown[0]} of the checkpoint has no place in the model of its recipe")
    whole = read_whole(folder, {MODEL + name: shapes[name] for name in names})
    return {name.removeprefix(MODEL): tensor for name, tensor in whole.items()}


def _model_with(recipe: RunRecipe, config: PreTrainedConfig, folder: Path) -> Any:
    model = _skeleton(recipe, config)
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
