"""environment.json: what was really in effect, read back from the prepared objects and the libraries themselves."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from typing import Any

import torch

from isotune.distributed.engines import EngineInEffect, whole_numel
from isotune.distributed.launch import Process
from isotune.models.packed_attention import kernel_in_effect
from isotune.run.malloc_tuning import VARIABLE

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Python's and the libraries' versions; a missing one is said to be absent."""
    found = {"python": platform.python_version(), "isotune": importlib.metadata.version("isotune")}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "absent"
    return found


def git_commit() -> str | None:
    """The commit of the folder that the run was started in, with `+` where files differ from it."""
    ask = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def devices(process: Process) -> dict[str, Any]:
    """The kind of device, its name and the threads a process, which decide how sums round; what glibc was told."""
    name = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else platform.processor()
    return {
        "device": process.device.type,
        "device_name": name or platform.machine(),
        "threads_per_process": torch.get_num_threads(),
        "heap_settings": os.environ.get(VARIABLE),
        "world_size": process.world_size,
    }


def in_effect(trainer: Any, engine: EngineInEffect) -> dict[str, Any]:
    """What training runs with, read from the prepared model and optimizer and not from what was asked."""
    inner: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trained = sum(whole_numel(p) for p in inner.parameters() if p.requires_grad)
    base = getattr(inner, "base_model", inner)
    config = getattr(base, "model", base).config if hasattr(inner, "peft_config") else inner.config
    return {
        **engine.as_dict(),
        "weights_dtype": str(next(p.dtype for p in inner.parameters() if p.is_floating_point())).removeprefix("torch."),
        "attention": config._attn_implementation,
        "attention_kernel": kernel_in_effect(trainer.args.device, _product_dtype(engine)),
        "exact_gradients": trainer.exact is not None,
        "trained_parameters": trained,
        "all_parameters": sum(whole_numel(p) for p in inner.parameters()),
        "gradient_checkpointing": bool(getattr(inner, "is_activation_checkpointing", False)),
    }


def _product_dtype(engine: EngineInEffect) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(engine.precision, torch.float32)


def command(secrets: Collection[str]) -> list[str]:
    """The command line of this process, with *** in the place of what was given to a flag of `secrets`."""
    told, hide = [os.path.basename(sys.executable)], False
    for word in sys.argv:
        flag = word.removeprefix("--").split("=", 1)[0].replace("-", "_")
        is_secret = word.startswith("--") and flag in secrets
        told.append("***" if hide else f"--{flag}=***" if is_secret and "=" in word else word)
        hide = is_secret and "=" not in word
    return told
