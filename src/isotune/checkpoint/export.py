"""Export of the model of a run or of a checkpoint, in formats that load without isotune and without unpickling code."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformers import PreTrainedConfig

from isotune.checkpoint.engine_state import MODEL, plain_model
from isotune.checkpoint.final_model import no_room_is_an_error, replace_folder, save_and_verify, staging_for
from isotune.checkpoint.flat_tensors import read_whole, stored
from isotune.checkpoint.manifest import InvalidCheckpoint, verify
from isotune.checkpoint.store import is_checkpoint
from isotune.checkpoint.writer import TENSORS
from isotune.config import ClassificationRecipe, Recipe, RunRecipe, kind_of
from isotune.config.recipes import AUTO
from isotune.config.task_types import SINGLE_LABEL
from isotune.data.classification.thresholds import THRESHOLDS_FILE
from isotune.data.sft.chat_format import GUANACO
from isotune.io.errors import RunFault, UserError
from isotune.io.run_files import RECIPE
from isotune.models.adapters.from_base import starts_from_base
from isotune.models.adapters.lora import add_adapters
from isotune.models.adapters.stored import read_adapter_config
from isotune.models.base.head import set_names
from isotune.models.base.hub import locate
from isotune.models.base.vocabulary import new_rows
from isotune.models.class_loss import PROBLEM_TYPES
from isotune.models.finished_run import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FinishedRun,
    Parity,
    load_run_tokenizer,
    load_whole_model,
    merge_run,
    read_run,
    settle,
)
from isotune.models.layouts.heads import head_of, head_rows
from isotune.models.log_control import quiet_libraries
from isotune.models.opening import (
    check_weights,
    empty_base_model,
    is_made_here,
    load_base_model,
    load_config,
    load_tokenizer,
)
from isotune.run.hub import keep_commits

Format = Literal["safetensors", "pt"]
STATE_DICT = "model.pt"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Export:
    """The result of an export; `parity` is None where nothing was merged."""

    folder: Path
    kind: Literal["adapter", "model"]
    format: Format
    parity: Parity | None


def export_run(
    run_dir: str | Path,
    *,
    merge: bool,
    format: str = "safetensors",
    output: str | Path | None = None,
    dtype: str | None = None,
) -> Export:
    """Write a run's model to a folder of its own.

    `safetensors` is a Hugging Face folder: the model, or without `merge` the adapter as it is. `pt` is `model.pt`, a
    state dict for `torch.load(weights_only=True)` and `load_state_dict`, with the configuration and tokenizer of the
    model. A run without an adapter has nothing to merge and is written as it is.

    Args:
        run_dir: RUN, or a checkpoint in RUN/checkpoints, whichever engine wrote it.
        merge: merge an adapter into its base.
        output: an empty or absent folder; None is RUN/export/KIND-FORMAT, or RUN/export/STEP-KIND-FORMAT.
        dtype: of merged weights, `float32`, `float16` or `bfloat16`; None is that of the base in training.

    Raises UserError where there is no run or no model, a file is broken, `output` is not empty, the format is unknown,
    or a merged model's logits are not those of the adapter, and RunFault where the files do not read back equal.
    """
    if format not in get_args(Format):
        raise UserError(f"--format {format} is unknown: it may be {' or '.join(get_args(Format))}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown: it may be {', '.join(DTYPES)}")
    source, given = Path(run_dir).expanduser(), Path(output).expanduser() if output else None
    if given is not None:
        _check_output(given)
    of_checkpoint = is_checkpoint(source)
    exports = (source.resolve().parents[1] if of_checkpoint else source) / "export"
    with contextlib.ExitStack() as stack:
        run = source
        if of_checkpoint:
            run = stack.enter_context(_run_of(source, beside=given.parent if given else exports))
        finished = read_run(run)
        merges = finished.is_adapter and merge
        if finished.is_adapter and not merge and format == "pt":
            raise UserError(f"{finished.model} is an adapter, which no model loads as a state dict: add --merge")
        if dtype is not None and not merges:
            raise UserError("--dtype is for merged weights: without an adapter to merge they are copied as they are")
        kind = "adapter" if finished.is_adapter and not merge else "model"
        name = f"{source.name}-" if of_checkpoint else ""
        folder = given or exports / f"{name}{'merged' if merges else kind}-{format}"
        _check_output(folder)
        parity = None
        if kind == "adapter":
            _copy_adapter(finished, folder)
            return Export(folder, kind, "safetensors", parity)
        if merges:
            model, tokenizer, parity = merge_run(finished, DTYPES[dtype] if dtype else None)
        else:
            model, tokenizer = load_whole_model(finished), load_run_tokenizer(finished)
            if of_checkpoint:
                settle(model, tokenizer)
        if format == "safetensors":
            save_and_verify(model, tokenizer, folder)
        else:
            _save_state_dict(model, tokenizer, folder)
        if (finished.model / THRESHOLDS_FILE).is_file():
            shutil.copy(finished.model / THRESHOLDS_FILE, folder)
        return Export(folder, kind, cast(Format, format), parity)


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder} exists and is not empty: name another folder or remove it")


def _copy_adapter(run: FinishedRun, folder: Path) -> None:
    """Copy the adapter, with the absolute path of its base model."""
    with staging_for(folder) as staging:
        shutil.copytree(run.model, staging)
        if os.path.isdir(str(run.base)):
            path = staging / ADAPTER_CONFIG
            settings = read_adapter_config(staging)
            settings["base_model_name_or_path"] = str(Path(str(run.base)).resolve())
            path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        check_weights(staging, ADAPTER_WEIGHTS)
    replace_folder(staging, folder)


def _save_state_dict(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write `model.pt`, load it as its user will into a new model, compare, and rename the folder into place."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    with staging_for(folder) as staging:
        staging.mkdir()
        if getattr(model.config, "use_cache", None) is not None:
            model.config.use_cache = True
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(str(staging))
        if model.can_generate():
            model.generation_config.to_json_file(str(staging / "generation_config.json"), use_diff=True)  # valid or not
        tokenizer.save_pretrained(str(staging))
        # Tied tensors share one storage in the file and keep both names: `load_state_dict` needs both.
        # A file opened by Python, because torch's own hides why a write failed.
        written = staging / STATE_DICT
        with written.open("wb") as file:
            torch.save(state, file)
        read = torch.load(written, weights_only=True, map_location="cpu")
        with torch.device("meta"):
            fresh = type(model)(model.config)
        try:
            fresh.load_state_dict(read, strict=True, assign=True)
        except RuntimeError as error:
            raise RunFault(f"{written} does not load into {type(model).__name__}: {error}") from error
        for name, tensor in state.items():
            if read[name].dtype != tensor.dtype or not torch.equal(read[name], tensor.cpu()):
                raise RunFault(f"{name} read back from {written} is not the one in memory")
    replace_folder(staging, folder)


# ---- a run out of a checkpoint ----


@contextlib.contextmanager
def _run_of(checkpoint: Path, beside: Path) -> Generator[Path]:
    """A temporary folder in `beside` with recipe.yaml and model/, as if the run had ended at the checkpoint.

    One process makes it, whatever the engine and the number of ranks that wrote the checkpoint. A base of an adapter
    that was drawn at random is written to RUN/base_model, as the run itself would do. Raises UserError for a checkpoint
    that is not valid, or whose model cannot be loaded.
    """
    with no_room_is_an_error(beside):
        beside.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=beside, prefix=".checkpoint-")
    with scratch as folder:
        run = Path(folder)
        try:
            manifest = verify(checkpoint)
        except InvalidCheckpoint as why:
            raise UserError(f"{checkpoint} is not a valid checkpoint: {why}") from why
        kind = kind_of(manifest.recipe)
        form = {"chat_format": GUANACO} if kind is Recipe else {}  # of a checkpoint that names none
        recipe = kind.from_values(**{**form, **manifest.recipe}, output_dir=folder)
        keep_commits(recipe, checkpoint.resolve().parents[1])
        tokenizer = load_tokenizer(recipe)
        config = _config_at(recipe, checkpoint / TENSORS)
        rows = new_rows(config, tokenizer, recipe)
        model: Any = plain_model(_model_at(recipe, config, checkpoint / TENSORS, rows), keep=True)
        if recipe.tune != "full":
            base = recipe.model_name_or_path
            if is_made_here(recipe):
                made = checkpoint.resolve().parents[1] / "base_model"
                if not made.is_dir():
                    save_and_verify(load_base_model(recipe, config, torch.device("cpu")), tokenizer, made)
                base = str(made)
            model.peft_config["default"].base_model_name_or_path = base
        save_and_verify(model, tokenizer, run / "model")
        recipe.write(run / RECIPE)
        yield run


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
