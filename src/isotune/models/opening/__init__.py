"""Opening models: `pretrained` by folder or Hub id, `recipe_model` by a recipe, `run_model` by a finished run."""

from isotune.compat.deepspeed import load_whole_models, whole_models
from isotune.models.opening.pretrained import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_weights,
    load_pretrained,
    load_pretrained_config,
    load_pretrained_tokenizer,
)
from isotune.models.opening.recipe_model import (
    compute_dtype,
    is_made_here,
    load_base_model,
    load_config,
    load_tokenizer,
    weights_dtype,
)
from isotune.models.opening.run_model import (
    FinishedRun,
    add_run_adapter,
    is_classifier,
    load_run_base,
    load_run_model,
    load_run_tokenizer,
    load_whole_model,
    read_run,
)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "FinishedRun",
    "add_run_adapter",
    "check_weights",
    "compute_dtype",
    "is_classifier",
    "is_made_here",
    "load_base_model",
    "load_config",
    "load_pretrained",
    "load_pretrained_config",
    "load_pretrained_tokenizer",
    "load_run_base",
    "load_run_model",
    "load_run_tokenizer",
    "load_tokenizer",
    "load_whole_model",
    "load_whole_models",
    "read_run",
    "weights_dtype",
    "whole_models",
]
