"""peft's LoRA layer as one autograd function, because on CPU its elementwise operations cost more than its products.

For `base(x) + lora_B(lora_A(dropout(x))) * scaling` with fp32 adapters under bf16 autocast, peft casts the input to
fp32, applies dropout in fp32, casts back, and writes three tensors of the output's size; in the backward pass it casts
and adds the input gradients of both branches. Here the input keeps its dtype, the adapter's product is added to the
base's output as it is computed (and its input gradient to the adapter's), and the scaling is part of a product.

Only vanilla LoRA on an unquantized linear layer is replaced; every other case uses peft's forward.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from isotune.compat.torch_ops import AutogradFunction
from isotune.models.cpu.cast_linear import cast_once, is_whole, linear
from isotune.models.cpu.dropout import (
    as_mask,
    draw_kept,
    draw_seed,
    mask_generator,
    masked,
    pack_kept,
    quantised_drop,
    unpack_mask,
)
from isotune.models.forward_patch import is_patched, patch_forward


def fuse_lora(model: nn.Module) -> int:
    """Patch every vanilla LoRA linear layer in `model`.

    Returns:
        number of patched layers.
    """
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and isinstance(m, nn.Module) and _is_vanilla(m)]
    for layer in layers:
        patch_forward(layer, _forward)
    return len(layers)


def _is_vanilla(layer: Any) -> bool:
    """Whether it is one adapter without variants on an unquantized linear layer."""
    return (
        type(layer).__name__ == "Linear"
        and len(layer.lora_A) == 1
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not getattr(layer, "fan_in_fan_out", False)
        and not is_patched(layer)
    )


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or self.disable_adapters or self.merged or len(self.lora_A) != 1:
        return self.stock_forward(x, *args, **kwargs)
    (name,) = self.lora_A
    base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    autocast = torch.is_autocast_enabled("cpu")
    compute = torch.get_autocast_dtype("cpu") if autocast else down.dtype
    same_dtype = autocast or x.dtype == compute == base.weight.dtype
    simple = type(base) is nn.Linear and not base.weight.requires_grad
    whole = simple and all(is_whole(p) for p in (base.weight, base.bias, down, up))
    if name not in self.active_adapters or x.device.type != "cpu" or not whole or not same_dtype:
        return self.stock_forward(x)
    drop = self.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) and self.training else 0.0
    return _LoraLinear.apply(x, base.weight, base.bias, down, up, self.scaling[name], p, compute)


class _LoraLinear(AutogradFunction):
    """x @ weight.T + bias + scaling * dropout(x) @ down.T @ up.T, with weight [out, in], down [r, in] and up [out, r].

    Weight and bias are frozen and get no gradient.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, x, weight, bias, down, up, scaling, p, compute) -> torch.Tensor:
        threshold, keep_scale = quantised_drop(p)
        rows = cast_once(x, compute).reshape(-1, x.shape[-1])
        kept = draw_kept(rows.shape, threshold, mask_generator(draw_seed())) if threshold else None
        ctx.packed = None if kept is None else pack_kept(kept)
        ctx.factor, ctx.input_dtype, ctx.compute = scaling * keep_scale, x.dtype, compute
        result = linear(rows, weight.to(compute), None if bias is None else bias.to(compute))
        inner = _masked(rows, None if kept is None else as_mask(kept)) @ down.to(compute).t()
        result.addmm_(inner, up.to(compute).t(), alpha=ctx.factor)
        ctx.save_for_backward(rows, inner, weight, down, up)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        rows, inner, weight, down, up = ctx.saved_tensors
        mask = None if ctx.packed is None else unpack_mask(ctx.packed, rows.shape)
        upstream = grad.reshape(-1, grad.shape[-1])
        inner_grad = (upstream @ up.to(ctx.compute)).mul_(ctx.factor)
        up_grad = (inner.t() @ upstream).t().to(up.dtype) * ctx.factor
        down_grad = (inner_grad.t() @ _masked(rows, mask)).to(down.dtype)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _masked(inner_grad @ down.to(ctx.compute), mask).addmm_(upstream, weight.to(ctx.compute))
            x_grad = x_grad.to(ctx.input_dtype).view(*grad.shape[:-1], -1)
        return x_grad, None, None, down_grad, up_grad, None, None, None


def _masked(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return rows if mask is None else masked(rows, mask)
