"""Export of a run's model, in formats that load without isotune and without unpickling code."""

import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from isotune.checkpoint.checkpoint_run import is_checkpoint, write_run_of
from isotune.checkpoint.final_model import no_room_is_an_error, replace_folder, save_and_verify, staging_for
from isotune.io.errors import RunFault, UserError
from isotune.models.finished_run import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FinishedRun,
    Parity,
    load_run_tokenizer,
    load_whole_model,
    merge_run,
    read_run,
)
from isotune.models.opening import check_weights

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
        format: `safetensors` or `pt`.
        output: an empty or absent folder; None is RUN/export/KIND-FORMAT, and RUN/export/STEP-KIND-FORMAT of a
            checkpoint.
        dtype: of merged weights, `float32`, `float16` or `bfloat16`; None is that of the base in training.

    Raises:
        UserError: no run, no model, a broken file, an output folder that is not empty, an unknown format, or a
            merged model whose logits are not those of the adapter.
        RunFault: the files do not read back equal.
    """
    if format not in get_args(Format):
        raise UserError(f"--format {format} is unknown: it may be {' or '.join(get_args(Format))}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown: it may be {', '.join(DTYPES)}")
    source = Path(run_dir).expanduser()
    if output:
        _check_output(Path(output).expanduser())
    if not is_checkpoint(source):
        return _export(read_run(source), source / "export", "", merge, format, output, dtype)
    run_of_it = source.resolve().parents[1]
    with _scratch(Path(output).expanduser().parent if output else run_of_it / "export") as scratch:
        write_run_of(source, scratch)
        return _export(read_run(scratch), run_of_it / "export", f"{source.name}-", merge, format, output, dtype)


@contextmanager
def _scratch(beside: Path) -> Generator[Path]:
    """A temporary folder on the disk of the result."""
    with no_room_is_an_error(beside):
        beside.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=beside, prefix=".checkpoint-")
    with folder as path:
        yield Path(path)


def _export(
    run: FinishedRun,
    exports: Path,
    prefix: str,
    merge: bool,
    format: str,
    output: str | Path | None,
    dtype: str | None,
) -> Export:
    if run.is_adapter and not merge and format == "pt":
        raise UserError(f"{run.model} is an adapter, which no model loads as a state dict: add --merge")
    if dtype is not None and not (run.is_adapter and merge):
        raise UserError("--dtype is for merged weights: without an adapter to merge they are copied as they are")
    kind = "adapter" if run.is_adapter and not merge else "model"
    name = "merged" if run.is_adapter and merge else kind
    folder = Path(output).expanduser() if output else exports / f"{prefix}{name}-{format}"
    _check_output(folder)
    if kind == "adapter":
        _copy_adapter(run, folder)
        return Export(folder, kind, "safetensors", None)
    model, tokenizer, parity = _whole_model(run, DTYPES[dtype] if dtype else None)
    if format == "safetensors":
        save_and_verify(model, tokenizer, folder)
        return Export(folder, kind, format, parity)
    _save_state_dict(model, tokenizer, folder)
    return Export(folder, kind, "pt", parity)


def _whole_model(run: FinishedRun, dtype: torch.dtype | None) -> tuple[Any, Any, Parity | None]:
    if run.is_adapter:
        return merge_run(run, dtype)
    return load_whole_model(run), load_run_tokenizer(run), None


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
            settings = json.loads(path.read_text("utf-8"))
            settings["base_model_name_or_path"] = str(Path(str(run.base)).resolve())
            path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        check_weights(staging, ADAPTER_WEIGHTS)
    replace_folder(staging, folder)


def _save_state_dict(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write `model.pt`, load it as its user will into a new model, compare, and rename the folder into place."""
    state = dict(model.state_dict())
    with staging_for(folder) as staging:
        staging.mkdir()
        if getattr(model.config, "use_cache", None) is not None:
            model.config.use_cache = True
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(str(staging))
        if model.can_generate():
            model.generation_config.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        # Tied tensors share one storage in the file and keep both names: `load_state_dict` needs both.
        # A file opened by Python, because torch's own hides why a write failed.
        with (staging / STATE_DICT).open("wb") as file:
            torch.save(state, file)
        _verify_state_dict(model, state, staging)
    replace_folder(staging, folder)


def _verify_state_dict(model: Any, state: dict[str, torch.Tensor], staging: Path) -> None:
    read = torch.load(staging / STATE_DICT, weights_only=True, map_location="cpu")
    with torch.device("meta"):
        fresh = type(model)(model.config)
    try:
        fresh.load_state_dict(read, strict=True, assign=True)
    except RuntimeError as error:
        raise RunFault(f"{staging / STATE_DICT} does not load into {type(model).__name__}: {error}") from error
    for name, tensor in state.items():
        if read[name].dtype != tensor.dtype or not torch.equal(read[name], tensor.cpu()):
            raise RunFault(f"{name} read back from {staging / STATE_DICT} is not the one in memory")
