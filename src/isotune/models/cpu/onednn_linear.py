"""fp32 linear layers by oneDNN in inference, because MKL runs at half speed on some processors.

On an AMD EPYC with AVX-512, torch's `linear` (MKL 2024.2) reaches 100 GFLOP/s on one core and oneDNN 220, in the same
dtype; on other processors the two are alike. They sum in different orders, so results differ by rounding. Training
keeps torch's `linear`, because its losses are promised bit for bit.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from isotune.compat.torch_ops import has_onednn_linear, onednn_linear, replaced_functional

_stock_linear = functional.linear


@contextlib.contextmanager
def onednn_products() -> Iterator[None]:
    """Within it, with gradients off, `torch.nn.functional.linear` of fp32 on CPU is oneDNN's, in any model.

    Where this build of torch has no oneDNN, nothing changes.
    """
    with replaced_functional("linear", _functional_linear) if has_onednn_linear() else contextlib.nullcontext():
        yield


def _functional_linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    if not _applies(input, weight, bias):
        return _stock_linear(input, weight, bias)
    # an input that is not contiguous would run through a scalar loop, 200 times slower
    return onednn_linear(input.contiguous(), weight, bias)


def _applies(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or input.numel() == 0 or not weight.is_contiguous():
        return False
    tensors = [t for t in (input, weight, bias) if t is not None]
    return weight.dim() == 2 and all(
        type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32
        for t in tensors
    )
