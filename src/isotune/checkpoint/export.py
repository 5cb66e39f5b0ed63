"""Export of the model of a run or of a checkpoint, in formats that load without isotune and without unpickling code."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from isotune.checkpoint.final_model import replace_folder, save_and_verify, staging_for
from isotune.checkpoint.formats.gguf_file import FILE as GGUF
from isotune.checkpoint.formats.gguf_file import load_gguf, need_gguf, refusal, save_gguf
from isotune.checkpoint.formats.gguf_tokenizer import NotWritten
from isotune.checkpoint.formats.ollama import FOLDER
from isotune.checkpoint.formats.onnx_graph import GRAPH, need_onnx, run_graph, save_graph
from isotune.checkpoint.formats.parity import FileParity, compare_file, logits_of, trained_model
from isotune.checkpoint.formats.rows import ComparedRows, Row, compared_rows
from isotune.checkpoint.formats.serving import write_modelfile, write_vllm
from isotune.checkpoint.formats.state_dict import STATE_DICT, load_state_dict_file, save_state_dict
from isotune.checkpoint.run_of_checkpoint import run_of
from isotune.checkpoint.store import is_checkpoint
from isotune.data.classification.thresholds import THRESHOLDS_FILE
from isotune.io.errors import RunFault, UserError
from isotune.io.run_files import run_of_checkpoint
from isotune.models.adapters.stored import read_adapter_config
from isotune.models.finished_run import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FinishedRun,
    Parity,
    is_classifier,
    load_run_tokenizer,
    load_whole_model,
    merge_run,
    read_run,
    settle,
)
from isotune.models.opening import check_weights

Format = Literal["safetensors", "pt", "onnx", "gguf"]
FILES: dict[Format, str] = {"pt": STATE_DICT, "onnx": GRAPH, "gguf": GGUF}  # beside the configuration
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Export:
    """The result of an export; `parity` is None where nothing was merged."""

    folder: Path
    kind: Literal["adapter", "model"]
    format: Format
    parity: Parity | None
    measured: FileParity  # of the files, run by what will run them, and the model as it was trained
    servers: tuple[str, ...]  # a line for each server: the command, or why there is none

    @property
    def place(self) -> Path:
        """The file that holds the model, or the folder of files."""
        return self.folder / FILES[self.format] if self.format in FILES else self.folder


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
    state dict for `torch.load(weights_only=True)` and `load_state_dict`; `onnx` is `model.onnx`, the model's graph with
    float32 weights. Both have the configuration and tokenizer of the model beside them. A run without an adapter has
    nothing to merge and is written as it is. What was written is then run by what will run it, on rows of the run's
    evaluation data, and its logits are compared with those of the model as it was trained. A language model in
    safetensors gets a script for vLLM and a Modelfile for Ollama, which ask it by the run's chat template.

    Args:
        run_dir: RUN, or a checkpoint in RUN/checkpoints, whichever engine wrote it.
        merge: merge an adapter into its base.
        output: an empty or absent folder; None is RUN/export/KIND-FORMAT, or RUN/export/STEP-KIND-FORMAT.
        dtype: of merged weights, `float32`, `float16` or `bfloat16`; None is that of the base in training.

    Raises UserError where there is no run or no model, a file is broken, `output` is not empty, the format is unknown
    or cannot hold the model, or a merged model's logits are not those of the adapter, and RunFault where the files do
    not read back equal or give other logits.
    """
    if format not in get_args(Format):
        raise UserError(f"--format {format} is unknown: it may be {' or '.join(get_args(Format))}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown: it may be {', '.join(DTYPES)}")
    if format == "onnx":
        need_onnx()
        if dtype not in (None, "float32"):
            raise UserError(f"--dtype {dtype} is for other formats: the weights of an ONNX graph are float32 here")
    if format == "gguf":
        need_gguf()
    source, given = Path(run_dir).expanduser(), _followed(Path(output).expanduser()) if output else None
    if given is not None:
        _check_output(given)
    of_checkpoint = is_checkpoint(source)
    exports = (run_of_checkpoint(source) if of_checkpoint else source) / "export"
    with contextlib.ExitStack() as stack:
        run = source
        if of_checkpoint:
            run = stack.enter_context(run_of(source, beside=given.parent if given else exports))
        finished = read_run(run)
        merges = finished.is_adapter and merge
        if finished.is_adapter and not merge and format in FILES:
            raise UserError(f"{finished.model} is an adapter, which --format {format} cannot hold: add --merge")
        if format == "gguf" and is_classifier(finished):
            raise UserError(f"{finished.folder} is the run of a classifier: --format gguf is for language models here")
        if dtype is not None and not merges:
            raise UserError("--dtype is for merged weights: without an adapter to merge they are copied as they are")
        kind = "adapter" if finished.is_adapter and not merge else "model"
        name = f"{source.name}-" if of_checkpoint else ""
        folder = given or _followed(exports / f"{name}{'merged' if merges else kind}-{format}")
        _check_output(folder)
        chosen, served = cast(Format, format), exports.resolve().parent.name
        rows, expected = _expected(finished, settles=of_checkpoint)
        try:
            if kind == "adapter":
                done = _write_adapter(finished, folder, served)
            else:
                done = _write_model(finished, folder, chosen, dtype, served, settles=of_checkpoint)
            found, runtime = _run_file(done.run, chosen, rows.rows)
            measured = compare_file(done.run, rows, expected, found, dtype=done.dtype, runtime=runtime)
            if not measured.parity.holds:
                raise RunFault(f"what was written to {folder} is not the model of {finished.folder} ({measured})")
        except BaseException as error:  # nothing stays that has not been run and compared
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, NotWritten):
                raise refusal(error, merges, source) from error
            raise
        return Export(folder, kind, chosen, done.parity, measured, done.servers)


@dataclass(frozen=True)
class _Written:
    """What has been written to a folder."""

    run: FinishedRun  # with the folder as its model, and without a base where that is whole
    dtype: torch.dtype  # of the weights in the file
    parity: Parity | None  # of merging
    servers: tuple[str, ...]


def _write_adapter(run: FinishedRun, folder: Path, served: str) -> _Written:
    _copy_adapter(run, folder)
    servers = () if is_classifier(run) else (write_vllm(run, folder, served),)
    return _Written(replace(run, model=folder), torch.float32, None, servers)


def _write_model(
    run: FinishedRun, folder: Path, format: Format, dtype: str | None, served: str, *, settles: bool
) -> _Written:
    """Write the whole model of a run, its adapter merged; `served` is what others call it.

    `settles` says that the model is that of a checkpoint, whose configuration training has not settled yet.
    """
    parity, whole = None, replace(run, base=None, model=folder)
    if run.is_adapter:
        merged_dtype = torch.float32 if format == "onnx" else DTYPES[dtype] if dtype else None
        model, tokenizer, parity = merge_run(run, merged_dtype)
    else:
        model, tokenizer = load_whole_model(run), load_run_tokenizer(run)
        if settles:
            settle(model, tokenizer)
    dtype_of_file = _save(model, tokenizer, folder, format)
    if (run.model / THRESHOLDS_FILE).is_file():
        shutil.copy(run.model / THRESHOLDS_FILE, folder)
    servers = list[str]()
    if model.can_generate() and format == "safetensors":
        servers.append(write_vllm(whole, folder, served))
    if model.can_generate() and format in ("safetensors", "gguf"):
        weights = f"./{GGUF}" if format == "gguf" else FOLDER
        servers.append(write_modelfile(model, tokenizer, folder, weights, served))
    return _Written(whole, dtype_of_file, parity, tuple(servers))


def _save(model: Any, tokenizer: Any, folder: Path, format: Format) -> torch.dtype:
    """Write a whole model; returns the dtype of the weights in the file."""
    dtype: torch.dtype = torch.float32 if format == "onnx" else model.dtype
    if format == "onnx":
        save_graph(model.float(), tokenizer, folder)
    elif format == "gguf":
        save_gguf(model, tokenizer, folder)
    elif format == "pt":
        save_state_dict(model, tokenizer, folder)
    else:
        save_and_verify(model, tokenizer, folder)
    return dtype


def _expected(run: FinishedRun, *, settles: bool) -> tuple[ComparedRows, list[torch.Tensor]]:
    """Rows, and what the model as it was trained says of them."""
    model = trained_model(run, settles=settles)
    rows = compared_rows(run, load_run_tokenizer(run), model.config)
    return rows, logits_of(model, rows.rows)


def _run_file(run: FinishedRun, format: Format, rows: Sequence[Row]) -> tuple[list[torch.Tensor], str]:
    """The logits that what was written gives of rows, and the name of what ran it."""
    if format == "onnx":
        return run_graph(run.model, rows), "onnxruntime"
    if format == "gguf":
        return logits_of(load_gguf(run.model), rows), "transformers' GGUF reader"
    if format == "pt":
        return logits_of(load_state_dict_file(run.model, is_classifier=is_classifier(run)), rows), "torch"
    return logits_of(trained_model(run), rows), "peft" if run.is_adapter else "transformers"


def _followed(folder: Path) -> Path:
    """A folder by its own name, since the new one is renamed to it: `.` has none, and a link would be replaced."""
    return Path(os.path.realpath(folder)) if folder.name in ("", "..") or folder.is_symlink() else folder


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder} exists and is not empty: name another folder or remove it")
    if folder.is_dir() and (os.path.ismount(folder) or folder.samefile(os.curdir)):  # neither can be replaced
        what = "a mount point" if os.path.ismount(folder) else "the folder that this command runs in"
        raise UserError(f"--output {folder} is {what}: name a folder inside it")


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
