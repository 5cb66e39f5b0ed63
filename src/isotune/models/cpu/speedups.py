"""The switches that make a step on CPU fast without changing what it computes beyond rounding.

`enable_speedups` once after the model is built (adapters included), `training_pass` around every forward pass and its
backward pass. On other devices both do nothing.
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

# Parameters of glibc's mallopt(3), and the largest block that it lets come from the heap.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGEST_HEAP_BLOCK = 32 * 2**20


def enable_speedups(model: nn.Module) -> None:
    """Replace what is slow in `model` by the same computation in fewer passes over memory.

    Takes effect on CPU only; a model on another device is left as it is.
    """
    if not _on_cpu(model):
        return
    keep_freed_memory()
    if any(name.endswith("lora_A") for name, _ in model.named_modules()):
        fuse_lora(model)
        # full tuning holds gradients and moments of every weight: there memory decides what fits
        for module in model.modules():
            setattr(module, KEEP_WEIGHTS, True)
    else:
        cast_linear_layers(model)
        slim_tied_embedding(model)


@contextlib.contextmanager
def training_pass(model: nn.Module) -> Iterator[None]:
    """Hold it around a forward pass and its backward pass: dropout on CPU is drawn the cheap way."""
    with fast_dropout() if _on_cpu(model) else contextlib.nullcontext():
        yield
    forget_cast()


@functools.cache
def keep_freed_memory() -> bool:
    """Ask glibc to reuse this process's freed memory instead of giving it back to the system between tensors.

    Activations and gradients come and go with every step; by default each returns as fresh pages that the kernel must
    clear again, 300,000 page faults in a step of full tuning. Blocks above 32 MiB still go back at once.

    Returns:
        whether the C library took the setting (glibc only).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    took_threshold = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
    return bool(took_threshold and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _on_cpu(model: nn.Module) -> bool:
    return next(model.parameters(), torch.empty(0)).device.type == "cpu"
