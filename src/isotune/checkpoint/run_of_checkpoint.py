"""A run out of a checkpoint: its model and recipe in a folder, as if training had ended there."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from isotune.checkpoint.engine_state import MODEL, plain_model
from isotune.checkpoint.final_model import no_room_is_an_error, save_and_verify
from isotune.checkpoint.flat_tensors import read_whole, stored
from isotune.checkpoint.manifest import manifest_of, verify
from isotune.checkpoint.writer import TENSORS
from isotune.config import ClassificationRecipe, Recipe, RunRecipe, kind_of
from isotune.config.recipes import AUTO
from isotune.config.task_types import SINGLE_LABEL
from isotune.data.sft.chat_format import GUANACO
from isotune.io.errors import RunFault
from isotune.io.files import write_synced
from isotune.io.run_files import RECIPE, run_of_checkpoint
from isotune.models.adapters.from_base import starts_from_base
from isotune.models.adapters.lora import add_adapters
from isotune.models.base.head import set_names
from isotune.models.base.hub import locate
from isotune.models.base.vocabulary import new_rows
from isotune.models.class_loss import PROBLEM_TYPES
from isotune.models.layouts.heads import head_of, head_rows
from isotune.models.log_control import quiet_libraries
from isotune.models.opening import empty_base_model, is_made_here, load_base_model, load_config, load_tokenizer
from isotune.run.hub import keep_commits
from isotune.run.run_lease import ATTEMPT_RECORD, Attempt

SCRATCH = ".checkpoint-"
ABANDONED_SECONDS = 7 * 86_400.0  # longer than any export takes


@contextlib.contextmanager
def run_of(checkpoint: Path, beside: Path) -> Generator[Path]:
    """A temporary folder in `beside` with recipe.yaml and model/, as if the run had ended at the checkpoint.

    One process makes it, whatever the engine and the number of ranks that wrote the checkpoint. A base of an adapter
    that was drawn at random is written to RUN/base_model, as the run itself would do. Raises UserError for a checkpoint
    that is not valid, or whose model cannot be loaded.
    """
    with no_room_is_an_error(beside):
        beside.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(beside)
        scratch = tempfile.TemporaryDirectory(dir=beside, prefix=SCRATCH)
    with scratch as folder:
        run = Path(folder)
        write_synced(run / ATTEMPT_RECORD, json.dumps(asdict(Attempt.current())) + "\n")
        manifest = manifest_of(checkpoint, verify)
        kind = kind_of(manifest.recipe)
        form = {"chat_format": GUANACO} if kind is Recipe else {}  # of a checkpoint that names none
        recipe = kind.from_values(**{**form, **manifest.recipe}, output_dir=folder)
        keep_commits(recipe, run_of_checkpoint(checkpoint))
        tokenizer = load_tokenizer(recipe)
        config = _config_at(recipe, checkpoint / TENSORS)
        rows = new_rows(config, tokenizer, recipe)
        model: Any = plain_model(_model_at(recipe, config, checkpoint / TENSORS, rows), keep=True)
        if recipe.tune != "full":
            base = recipe.model_name_or_path
            if is_made_here(recipe):
                made = run_of_checkpoint(checkpoint) / "base_model"
                if not made.is_dir():
                    save_and_verify(load_base_model(recipe, config, torch.device("cpu")), tokenizer, made)
                base = str(made)
            model.peft_config["default"].base_model_name_or_path = base
        save_and_verify(model, tokenizer, run / "model")
        recipe.write(run / RECIPE)
        yield run


def _remove_abandoned(beside: Path) -> None:
    """Remove what exports that were killed left in `beside`, each a whole model.

    A process of this machine is looked up; one of another machine counts as killed after `ABANDONED_SECONDS`.
    """
    for folder in beside.glob(f"{SCRATCH}*"):
        record = folder / ATTEMPT_RECORD
        owner = Attempt.read(record)
        if owner is None:  # it was not made here, or begins at this moment
            continue
        with contextlib.suppress(OSError):
            age_seconds = time.time() - record.stat().st_mtime
            if not owner.is_running if owner.is_local else age_seconds > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _config_at(recipe: RunRecipe, tensors: Path) -> PreTrainedConfig:
    """The model's configuration; a classifier has as many classes as its head's last bias has elements."""
    config = load_config(recipe)
    if isinstance(recipe, ClassificationRecipe):
        heads = set(head_of(config))
        lengths = [
            length
            for name, (length, _) in stored(tensors).items()
            if name.startswith(MODEL) and name.endswith(".bias") and heads & set(name.removeprefix(MODEL).split("."))
        ]
        if not lengths:  # a decoder's `score` has no bias: its weights are as many rows as there are classes
            rows = head_rows(config)
            sizes = {name: length for name, (length, _) in stored(tensors).items() if name.endswith(tuple(rows))}
            lengths = [sizes[name] // size for name in sizes for end, size in rows.items() if name.endswith(end)]
        if not lengths:
            raise RunFault(f"the checkpoint holds no classification head ({' or '.join(sorted(heads))})")
        task_type = SINGLE_LABEL if recipe.task_type == AUTO else recipe.task_type
        set_names(config, min(lengths), recipe.label_names, PROBLEM_TYPES[task_type])
    return config


def _model_at(recipe: RunRecipe, config: PreTrainedConfig, tensors: Path, rows: Sequence[int]) -> Any:
    """The model of a recipe with the trained tensors of a checkpoint; what is frozen stays on the meta device.

    A frozen base is loaded where the adapter's start was taken out of it.
    """
    if starts_from_base(recipe.init_lora_weights):
        model: Any = load_base_model(recipe, config, torch.device("cpu"), new_rows=rows)
        model = add_adapters(model, recipe, rows)
    else:
        with torch.device("meta"), quiet_libraries():
            model = _empty_model(recipe, config, rows)
            if recipe.tune != "full":
                model = add_adapters(model, recipe, rows)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = [name.removeprefix(MODEL) for name in stored(tensors) if name.startswith(MODEL)]
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise RunFault(f"{unknown[0]} of the checkpoint has no place in the model of its recipe")
    whole = read_whole(tensors, {MODEL + name: shapes[name] for name in names})
    trained = {name.removeprefix(MODEL): tensor for name, tensor in whole.items()}
    model.load_state_dict(trained, strict=False, assign=True)
    if recipe.tune == "full":
        model.tie_weights()
        absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if absent:
            raise RunFault(f"{absent[0]} of the model is not in the checkpoint")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _empty_model(recipe: RunRecipe, config: PreTrainedConfig, rows: Sequence[int]) -> Any:
    """The base model of a recipe without weights, with the settings of generation that its files have."""
    from transformers import GenerationConfig

    model = empty_base_model(recipe, config, rows)
    if not isinstance(recipe, ClassificationRecipe) and not is_made_here(recipe):
        with contextlib.suppress(OSError):  # most models have no file of it
            located = locate(recipe.model_name_or_path, "model", recipe.model_revision)
            model.generation_config = cast(Any, GenerationConfig).from_pretrained(located.name, **located.arguments)
    return model
