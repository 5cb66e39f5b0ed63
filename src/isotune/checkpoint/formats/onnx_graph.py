"""`model.onnx`: the graph of the stock model, traced by transformers' own exporter and run by ONNX Runtime.

The graph takes whole sequences and gives their logits: batch and sequence are axes of any length, and a language model
keeps no cache between calls. Weights are float32, in `model.onnx.data`.
"""

import contextlib
import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from isotune.checkpoint.final_model import replace_folder, staging_for
from isotune.checkpoint.formats.rows import Row
from isotune.checkpoint.formats.state_dict import save_settings
from isotune.io.errors import RunFault, UserError, first_line
from isotune.io.extras import need
from isotune.models.classifier import takes_token_types
from isotune.models.log_control import quiet_libraries
from isotune.models.opening import load_pretrained_config
from isotune.models.packed_attention import max_positions

GRAPH = "model.onnx"
AXES = ("batch", "sequence")
TRACED_TOKENS = 8
BATCH_ROWS = 4  # of one call, so that a batch with padding is compared too


def need_onnx() -> None:
    """UserError where a package that writes or runs such a graph is missing."""
    for package in ("onnxscript", "onnxruntime"):
        need(package, "--format onnx")


def save_graph(model: Any, tokenizer: Any, folder: Path) -> None:
    """Trace a stock model with float32 weights, and write its graph beside its configuration and tokenizer.

    UserError where its code cannot be traced, and RunFault where an axis of the graph has got a fixed length.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    model = model.eval().requires_grad_(False)
    traced = [Row([5] * TRACED_TOKENS), Row([5] * (TRACED_TOKENS - 1))]
    sample: dict[str, Any] = dict(_padded(traced, _pad(model.config)))
    if not takes_token_types(model) or "token_type_ids" not in tokenizer.model_input_names:
        del sample["token_type_ids"]
    axes = {0: Dim(AXES[0], max=2**16), 1: Dim(AXES[1], max=max_positions(model.config) or 2**20)}
    shapes = dict.fromkeys(sample, axes)
    if getattr(model.config, "use_cache", None) is not None:
        sample["use_cache"] = False
    settings = OnnxConfig(dynamic=True, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True)
    with quiet_libraries(), contextlib.redirect_stdout(io.StringIO()):  # torch tells its steps
        try:
            exporter: Any = OnnxExporter()
            program = exporter.export(model, sample, settings).program
        except Exception as error:  # whatever the model's own code raises when it is traced
            raise UserError(
                f"{type(model).__name__} cannot be traced for ONNX by these versions of torch and transformers "
                f"({first_line(error)}): --format safetensors has it"
            ) from error
    for given in program.graph.inputs:
        if any(isinstance(length, int) for length in given.shape):
            raise RunFault(f"the input {given.name} of the ONNX graph has a fixed shape: {given.shape}")
    with staging_for(folder) as staging:
        staging.mkdir()
        exporter.save_program(program, staging / GRAPH)
        save_settings(model, tokenizer, staging)
    replace_folder(staging, folder)


def run_graph(folder: Path, rows: Sequence[Row]) -> list[Tensor]:
    """The logits of each row by ONNX Runtime on the CPU, some rows a call: as `logits_of` gives them."""
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    names = {given.name for given in session.get_inputs()}
    pad, found = _pad(load_pretrained_config(str(folder))), list[Tensor]()
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        given = {name: values.numpy() for name, values in _padded(batch, pad).items() if name in names}
        (logits,) = session.run(["logits"], given)
        for row, own in zip(batch, torch.tensor(logits), strict=True):
            found.append(own[: len(row.ids)] if own.ndim == 2 else own[None])
    return found


def _padded(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Rows as one batch, padded on the right: int64 [rows, tokens] each."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, mask, types = (torch.full(shape, value) for value in (pad, 0, 0))
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = 1
        if row.first_type is not None:
            types[number, row.first_type : len(row.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _pad(config: Any) -> int:
    """The token that fills a batch up; it is masked, so that it may be any where the model names none."""
    pad = config.get_text_config().pad_token_id
    return 0 if pad is None else int(pad)
