"""Linear layers under autocast that keep no 16-bit copy of their weights, because memory peaks while it waits.

Autocast casts every weight once and the graph holds the cast until its backward pass: half as much again as the fp32
weights themselves, at the moment when activations are at their peak. Here the backward pass casts again, which is a
small pass over memory beside the product that it serves. And autocast casts an input for every layer that reads it,
three times for query, key and value; `cast_once` does it once.

What is computed is the same, to the bit in outputs and in the gradients of inputs and weights.
"""

import functools
import types
import weakref
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from isotune.models.cpu.onednn_linear import has_onednn_linear, onednn_linear

_last: tuple[weakref.ref, int, torch.Tensor] | None = None


def cast_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x.detach().to(dtype)`; the same tensor again where `x` is what was cast last and has not changed since."""
    global _last
    if x.dtype == dtype:
        return x.detach()
    if _last is not None and _last[0]() is x and _last[1] == x._version and _last[2].dtype == dtype:
        return _last[2]
    cast = x.detach().to(dtype)
    _last = weakref.ref(x), x._version, cast
    return cast


def forget_cast() -> None:
    """Let go of the tensor that `cast_once` made last."""
    global _last
    _last = None


def is_whole(parameter: torch.Tensor | None) -> bool:
    """Whether this process holds the parameter as an ordinary tensor; an engine that shards must see modules called."""
    return parameter is None or (type(parameter) is nn.Parameter and not hasattr(parameter, "ds_id"))


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear` on CPU; in bf16 with a bias, the same bits in a tenth less time.

    torch writes the bias out over the result and adds the product to it; oneDNN adds the bias as it writes the product.
    """
    quicker = bias is not None and rows.dtype == torch.bfloat16 and rows.is_contiguous()  # else torch rounds twice
    if not quicker or not _adds_bias_in_passing():
        return functional.linear(rows, weight, bias)
    return onednn_linear(rows, weight, bias)


@functools.cache
def _adds_bias_in_passing() -> bool:
    return has_onednn_linear() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cast_linear_layers(model: nn.Module) -> int:
    """Give every trained plain linear layer below `model` the leaner forward.

    Returns:
        how many layers were changed.
    """
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    trained = [layer for layer in layers if layer.weight.requires_grad]
    for layer in trained:
        layer._plain_forward = layer.forward
        layer.forward = types.MethodType(_forward, layer)
    return len(trained)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    lean = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    compute = torch.get_autocast_dtype("cpu")
    if not lean or self.weight.dtype == compute or not (is_whole(self.weight) and is_whole(self.bias)):
        return self._plain_forward(x)
    return _CastLinear.apply(x, self.weight, self.bias, compute)


class _CastLinear(torch.autograd.Function):
    """x @ weight.T + bias in `compute`, with weight [out, in]."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, x, weight, bias, compute) -> torch.Tensor:  # type: ignore[override]
        rows = cast_once(x, compute)
        ctx.input_type, ctx.compute = x.dtype, compute
        ctx.bias_type = None if bias is None else bias.dtype
        ctx.save_for_backward(rows, weight)
        return linear(rows, weight.to(compute), None if bias is None else bias.to(compute))

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        upstream = grad.reshape(-1, grad.shape[-1])
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (upstream @ weight.to(ctx.compute)).to(ctx.input_type).view(rows.shape)
        if ctx.needs_input_grad[1]:
            weight_grad = (upstream.t() @ rows.reshape(-1, rows.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            bias_grad = upstream.sum(dim=0, dtype=ctx.bias_type)
        return x_grad, weight_grad, bias_grad, None
