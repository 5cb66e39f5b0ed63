"""environment.json: what was in effect, read back from the prepared objects and the libraries."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of
from isotune.config.unsupported_keys import TOKEN_NAMES
from isotune.distributed.engines import whole_numel
from isotune.distributed.launch import Process
from isotune.run.malloc_tuning import VARIABLE

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, isotune and the libraries; `absent` where a library is not installed."""
    installed = {"python": platform.python_version(), "isotune": importlib.metadata.version("isotune")}
    installed |= dict.fromkeys(LIBRARIES, "absent")
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[library] = importlib.metadata.version(library)
    return installed


def git_commit() -> str | None:
    """Commit of the working directory, followed by `+` where files differ from it; None outside a repository."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def devices(process: Process) -> dict[str, Any]:
    """Device type and name, threads per process (they decide how sums round), malloc settings and world size."""
    name = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else platform.processor()
    return {
        "device": process.device.type,
        "device_name": name or platform.machine(),
        "threads_per_process": torch.get_num_threads(),
        "heap_settings": os.environ.get(VARIABLE),
        "world_size": process.world_size,
    }


def in_effect(trainer: Any, engine: dict[str, Any]) -> dict[str, Any]:
    """What training runs with, read from the prepared model and optimizer, not from the recipe."""
    inner: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trained_parameters = sum(whole_numel(p) for p in inner.parameters() if p.requires_grad)
    return {
        **engine,
        "weights_dtype": str(next(p.dtype for p in inner.parameters() if p.is_floating_point())).removeprefix("torch."),
        "attention": attention_of(base_model_of(inner).config),
        "deterministic": torch.are_deterministic_algorithms_enabled() or trainer.args.device.type == "cpu",
        "exact_gradients": trainer.update.sync.exact is not None,
        "trained_parameters": trained_parameters,
        "all_parameters": sum(whole_numel(p) for p in inner.parameters()),
        "gradient_checkpointing": bool(getattr(inner, "is_activation_checkpointing", False)),
    }


def command() -> list[str]:
    """The command line of this process, with *** for a token: a script of one's own may have a flag for it."""
    words, hide_next = [os.path.basename(sys.executable)], False
    for word in sys.argv:
        flag = word.removeprefix("--").split("=", 1)[0].replace("-", "_")
        is_secret = word.startswith("--") and flag in TOKEN_NAMES
        words.append("***" if hide_next else f"--{flag}=***" if is_secret and "=" in word else word)
        hide_next = is_secret and "=" not in word
    return words
