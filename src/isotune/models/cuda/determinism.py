"""The same bits every time on a GPU, whose fastest kernels add up in the order in which their threads happen to end.

CPU kernels are deterministic for a given number of threads. On CUDA the backward pass of attention and the sums behind
embeddings, index and scatter operations are so only where torch is told, and cuBLAS only with a fixed workspace.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from isotune.io.errors import RunFault

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it at its first product
NO_KERNEL = "does not have a deterministic implementation"


def use_deterministic_kernels(device: torch.device, *, promised_by: str, is_main: bool) -> None:
    """On CUDA use deterministic kernels from now on, and say that they cost speed; `promised_by` is the key for it."""
    if device.type != "cuda":
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    # which would write NaN into every new tensor: a pass over memory, and nothing here reads what was never written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  (a property of the module)
    if is_main:
        print(f"note        deterministic kernels, which cost speed: {promised_by} promises the same bits")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """RunFault where an operator of the model has no deterministic kernel."""
    try:
        yield
    except RuntimeError as error:
        if NO_KERNEL not in str(error):
            raise
        name = str(error).split(NO_KERNEL)[0].strip()
        raise RunFault(
            f"{name} has no deterministic kernel on this device, so the same bits cannot be promised: say "
            "exact_gradients: false and resume: never to train without that"
        ) from error
