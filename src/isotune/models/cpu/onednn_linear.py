"""fp32 linear layers by oneDNN while nothing is learned, because MKL runs at half speed on some processors.

On an AMD EPYC with AVX-512, torch's own `linear` (MKL 2024.2) reaches 100 GFLOP/s on one core and oneDNN 220, on the
same numbers in the same type; where MKL is at its best the two are alike. They add the same products up in another
order, so results differ by rounding. Training keeps torch's own: its losses are promised to the bit.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

_stock_linear = functional.linear


def has_onednn_linear() -> bool:
    """Whether this build of torch has `onednn_linear`."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """input [..., in] @ weight.T + bias by oneDNN, with weight [out, in]; the input contiguous."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Within it, and where gradients are off, `torch.nn.functional.linear` of fp32 on CPU is oneDNN's, in any model.

    Where this build of torch has no oneDNN, nothing changes.
    """
    before = functional.linear
    if has_onednn_linear():
        functional.linear = _divert
    try:
        yield
    finally:
        functional.linear = before


def _divert(input: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    if not _fits(input, weight, bias):
        return _stock_linear(input, weight, bias)
    # an input or a weight that is not contiguous would go through a loop without vectors, 200 times slower
    return onednn_linear(input.contiguous(), weight, bias)


def _fits(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or input.numel() == 0 or not weight.is_contiguous():
        return False
    known = (torch.Tensor, torch.nn.Parameter)
    plain = [one for one in (input, weight, bias) if one is not None]
    return weight.dim() == 2 and all(
        type(one) in known and one.device.type == "cpu" and one.dtype == torch.float32 for one in plain
    )
