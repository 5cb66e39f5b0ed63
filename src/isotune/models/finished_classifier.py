"""The classifier of a finished run: how it is told from a language model, and the base of its adapter with its head."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from isotune.data.sources.hub import first_line
from isotune.io.errors import UserError
from isotune.models.classifier import head_of
from isotune.models.finished_run import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LOADING_ERRORS,
    FinishedRun,
    load_run_base,
    load_weights,
)


def is_classifier(run: FinishedRun) -> bool:
    """Whether RUN/model classifies sequences, by its own configuration.

    Raises:
        UserError: that is unreadable.
    """
    file = run.model / (ADAPTER_CONFIG if run.is_adapter else "config.json")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    if run.is_adapter:
        return config.get("task_type") == "SEQ_CLS"
    return any(kind.endswith("ForSequenceClassification") for kind in config.get("architectures") or ())


def load_whole_model(run: FinishedRun) -> Any:
    """The model of a run without an adapter, of either kind, in the type that its files have.

    Raises:
        UserError: it cannot be loaded whole.
    """
    assert not run.is_adapter
    return load_weights(str(run.model), dtype="auto", **_kind(run))


def load_base_of(run: FinishedRun, device: torch.device, *, dequantised: bool) -> Any:
    """`load_run_base` for either kind of run; a classifier's head has the adapter's size, and the adapter brings it.

    Raises:
        UserError: the base cannot be loaded, or the adapter holds no head.
    """
    return load_run_base(run, device, dequantised=dequantised, **_kind(run))


def _kind(run: FinishedRun) -> dict[str, Any]:
    """What `load_weights` must know beside the name."""
    if not is_classifier(run):
        return {}
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not run.is_adapter:
        return {"auto": AutoModelForSequenceClassification}
    try:
        config = AutoConfig.from_pretrained(str(run.base))
    except LOADING_ERRORS as error:
        raise UserError(f"the base model {run.base} cannot be loaded: {first_line(error)}") from error
    heads = head_of(config)
    config.num_labels = classes_of_adapter(run.model / ADAPTER_WEIGHTS, heads)
    return {"auto": AutoModelForSequenceClassification, "config": config, "may_lack": heads}


def classes_of_adapter(file: Path, heads: Sequence[str]) -> int:
    """The classes of an adapter's head: of its matrices the last has the fewest rows.

    Raises:
        UserError: the file has no head.
    """
    with safe_open(str(file), framework="pt") as tensors:
        names = [name for name in tensors.keys() if set(name.split(".")) & set(heads) and "lora_" not in name]  # noqa: SIM118
        shapes = [tensors.get_slice(name).get_shape() for name in names]
    if not any(len(shape) == 2 for shape in shapes):
        raise UserError(f"{file} has no classification head ({' or '.join(heads)})")
    return min(shape[0] for shape in shapes if len(shape) == 2)
