"""Turning on the CPU speed-ups, which change results by rounding only.

Call `enable_speedups` once the model is built, adapters included, and hold `training_microbatch` around the forward and
the backward pass of every microbatch. On other devices both do nothing.
"""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator

import torch
from torch import nn

from isotune.models.cpu.cast_linear import cast_linear_layers, forget_cast
from isotune.models.cpu.dropout import fast_dropout
from isotune.models.cpu.fused_lora import fuse_lora
from isotune.models.cpu.tied_embedding import slim_tied_embedding
from isotune.models.packed_attention import KEEP_WEIGHTS

# Parameters of glibc's mallopt(3), and the largest threshold that it accepts.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGEST_HEAP_BLOCK = 32 * 2**20


def enable_speedups(model: nn.Module) -> None:
    """Patch the slow layers of a model on CPU with the same computation in fewer passes over memory."""
    if not _on_cpu(model):
        return
    keep_freed_memory()
    if any(name.endswith("lora_A") for name, _ in model.named_modules()):
        fuse_lora(model)
        # not in full fine-tuning, where gradients and moments of every weight already fill the memory
        for module in model.modules():
            setattr(module, KEEP_WEIGHTS, True)
    else:
        cast_linear_layers(model)
        slim_tied_embedding(model)


@contextlib.contextmanager
def training_microbatch(model: nn.Module) -> Iterator[None]:
    """Hold it around the forward and backward pass of a microbatch: dropout on CPU is `isotune.models.cpu.dropout`."""
    with fast_dropout() if _on_cpu(model) else contextlib.nullcontext():
        yield
    forget_cast()


@functools.cache
def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for reuse instead of returning it to the system between tensors.

    By default activations and gradients get fresh pages in every step, which the kernel must clear: 300,000 page faults
    in a step of full fine-tuning. Blocks above 32 MiB are still returned at once.

    Returns:
        whether the C library accepted the setting (glibc only).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    accepted = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
    return bool(accepted and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _on_cpu(model: nn.Module) -> bool:
    return next(model.parameters(), torch.empty(0)).device.type == "cpu"
