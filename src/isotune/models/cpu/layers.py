"""A model's layers on CPU in fewer passes over memory, which changes results by rounding only.

Call `enable_speedups` once the model is built, adapters included; on other devices it does nothing.
"""

import ctypes
import functools
import platform
import weakref
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from isotune.compat.deepspeed import gather_with, is_gathered_with
from isotune.compat.torch import AutogradFunction, in_place_changes, is_patched, patch_forward
from isotune.models.cpu.functional import as_mask, draw_call, linear, masked, pack_kept, unpack_mask
from isotune.models.document_keys import current_documents, quantised_drop
from isotune.models.packed_attention import KEEP_WEIGHTS

# Parameters of glibc's mallopt(3), and the largest threshold that it accepts.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGEST_HEAP_BLOCK = 32 * 2**20

_last: tuple[weakref.ref, int, torch.Tensor] | None = None


def enable_speedups(model: nn.Module, *, zero3: bool = False) -> None:
    """Patch the slow layers of a model on CPU with the same computation in fewer passes over memory.

    `zero3`: ZeRO-3 is going to partition the model.
    """
    if not _on_cpu(model):
        return
    keep_freed_memory()
    if any(name.endswith("lora_A") for name, _ in model.named_modules()):
        fuse_lora(model, zero3=zero3)
        # not in full fine-tuning, where gradients and moments of every weight already fill the memory
        for module in model.modules():
            setattr(module, KEEP_WEIGHTS, True)
    else:
        cast_linear_layers(model)
        slim_tied_embedding(model)


@functools.cache
def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for reuse instead of returning it to the system between tensors.

    By default activations and gradients get fresh pages in every step, which the kernel must clear: 300,000 page faults
    in a step of full fine-tuning. Blocks above 32 MiB are still returned at once. Returns whether the C library
    accepted the setting (glibc only).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    accepted = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
    return bool(accepted and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _on_cpu(model: nn.Module) -> bool:
    return next(model.parameters(), torch.empty(0)).device.type == "cpu"


def is_whole(parameter: torch.Tensor | None) -> bool:
    """Whether the parameter is not sharded; a sharding engine gathers weights only where their module is called."""
    return parameter is None or (type(parameter) is nn.Parameter and not hasattr(parameter, "ds_id"))


def cast_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x.detach().to(dtype)`; the same result as in the last call, where that was of the same unchanged `x`.

    Autocast casts an input for every layer that reads it, three times for query, key and value.
    """
    global _last
    if x.dtype == dtype:
        return x.detach()
    if _last is not None and _last[0]() is x and _last[1] == in_place_changes(x) and _last[2].dtype == dtype:
        return _last[2]
    cast = x.detach().to(dtype)
    _last = weakref.ref(x), in_place_changes(x), cast
    return cast


def forget_cast() -> None:
    """Free the result that `cast_once` keeps."""
    global _last
    _last = None


def cast_linear_layers(model: nn.Module) -> int:
    """Make the trained linear layers of `model` save no 16-bit copy of their weights; returns their number.

    Autocast casts every weight once, and the autograd graph holds the copy until the backward pass: half the size of
    the fp32 weights, at the moment when activations are at their peak. Here the backward pass casts again, which is
    cheap beside its matrix product. Outputs and gradients of inputs and weights are the same bits as without it.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and not is_patched(m) and m.weight.requires_grad]
    for layer in layers:
        patch_forward(layer, _linear_forward)
    return len(layers)


def _linear_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    applies = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    compute = torch.get_autocast_dtype("cpu")
    if not applies or self.weight.dtype == compute or not (is_whole(self.weight) and is_whole(self.bias)):
        return self.stock_forward(x)
    return _CastLinear.apply(x, self.weight, self.bias, compute)


class _CastLinear(AutogradFunction):
    """x @ weight.T + bias in `compute`, with weight [out, in]."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, x, weight, bias, compute) -> torch.Tensor:
        rows = cast_once(x, compute)
        ctx.input_dtype, ctx.compute = x.dtype, compute
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(rows, weight)
        return linear(rows, weight.to(compute), None if bias is None else bias.to(compute))

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        rows, weight = ctx.saved_tensors
        upstream = grad.reshape(-1, grad.shape[-1])
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (upstream @ weight.to(ctx.compute)).to(ctx.input_dtype).view(rows.shape)
        if ctx.needs_input_grad[1]:
            weight_grad = (upstream.t() @ rows.reshape(-1, rows.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            bias_grad = upstream.sum(dim=0, dtype=ctx.bias_dtype)
        return x_grad, weight_grad, bias_grad, None


def fuse_lora(model: nn.Module, *, zero3: bool = False) -> int:
    """Make each vanilla LoRA linear layer of `model` one autograd function; returns their number.

    On CPU the layer's elementwise operations cost more than its products. For `base(x) + lora_B(lora_A(dropout(x))) *
    scaling` with fp32 adapters under bf16 autocast, peft casts the input to fp32, applies dropout in fp32, casts back,
    and writes three tensors of the output's size; in the backward pass it casts and adds the input gradients of both
    branches. Here the input keeps its dtype, the adapter's product is added to the base's output as it is computed (and
    its input gradient to the adapter's), and the scaling is part of a product. Every other case uses peft's forward.
    `zero3`: ZeRO-3 is going to partition the weights, and shall gather all of a layer together.
    """
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and isinstance(m, nn.Module) and _is_vanilla(m)]
    for layer in layers:
        patch_forward(layer, _lora_forward)
        if zero3:
            gather_with(layer, list(layer.parameters()))
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


def _lora_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or self.disable_adapters or self.merged or len(self.lora_A) != 1:
        return self.stock_forward(x, *args, **kwargs)
    (name,) = self.lora_A
    base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    autocast = torch.is_autocast_enabled("cpu")
    compute = torch.get_autocast_dtype("cpu") if autocast else down.dtype
    same_dtype = autocast or x.dtype == compute == base.weight.dtype
    simple = type(base) is nn.Linear and not base.weight.requires_grad
    whole = simple and all(is_whole(p) or is_gathered_with(self, p) for p in (base.weight, base.bias, down, up))
    if name not in self.active_adapters or x.device.type != "cpu" or not whole or not same_dtype:
        return self.stock_forward(x)
    drop = self.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) and self.training else 0.0
    if p and current_documents() is None:
        return self.stock_forward(x)
    result = _LoraLinear.apply(x, base.weight, base.bias, down, up, self.scaling[name], p, compute)
    # here, for models that add to it in place: a function may return no view
    return result.view(*x.shape[:-1], result.shape[-1])


class _LoraLinear(AutogradFunction):
    """x @ weight.T + bias + scaling * dropout(x) @ down.T @ up.T, with weight [out, in], down [r, in] and up [out, r].

    The result is [tokens, out]. The weight is frozen and gets no gradient; the bias gets one where `bias: lora_only` or
    `all` trains it.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, x, weight, bias, down, up, scaling, p, compute) -> torch.Tensor:
        threshold, keep_scale = quantised_drop(p)
        rows = cast_once(x, compute).reshape(-1, x.shape[-1])
        kept = draw_call(x.shape, threshold).view(rows.shape) if threshold else None
        ctx.packed = None if kept is None else pack_kept(kept)
        ctx.factor, ctx.input_dtype, ctx.compute = scaling * keep_scale, x.dtype, compute
        ctx.bias_dtype = None if bias is None else bias.dtype
        # the largest tensor first: small ones that outlive this call, allocated before it, fragment the heap
        result = linear(rows, weight.to(compute), None if bias is None else bias.to(compute))
        inner = masked(rows, None if kept is None else as_mask(kept)) @ down.to(compute).t()
        result.addmm_(inner, up.to(compute).t(), alpha=ctx.factor)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.input_shape = x.shape
        return result

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        rows, inner, weight, down, up = ctx.saved_tensors
        mask = None if ctx.packed is None else unpack_mask(ctx.packed, rows.shape)
        inner_grad = (grad @ up.to(ctx.compute)).mul_(ctx.factor)
        up_grad = (inner.t() @ grad).t().to(up.dtype) * ctx.factor
        down_grad = (inner_grad.t() @ masked(rows, mask)).to(down.dtype)
        x_grad = bias_grad = None
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum(dim=0, dtype=ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            x_grad = masked(inner_grad @ down.to(ctx.compute), mask).addmm_(grad, weight.to(ctx.compute))
            x_grad = x_grad.to(ctx.input_dtype).view(ctx.input_shape)
        return x_grad, None, bias_grad, down_grad, up_grad, None, None, None


def slim_tied_embedding(model: nn.Module) -> bool:
    """Patch the input embedding of `model`, where it is trained and tied to the head; returns whether it did.

    A tied weight has two gradients. The head's is dense and comes first. The embedding's comes last, when the gradients
    of all other weights exist, and would be another 103 MB of fp32 for a vocabulary of 50,272 and a width of 512,
    nearly all zero. Here only the rows of tokens that occur are computed, and are added in place to the head's
    gradient, just before autograd gives it to the parameter. The result is the same bits: the gradients of a token that
    occurs twice are summed first, in their order.
    """
    if not hasattr(model, "get_input_embeddings"):
        return False
    language_model: Any = model
    embedding = language_model.get_input_embeddings()
    head = language_model.get_output_embeddings()
    is_stock = type(embedding) is nn.Embedding and not is_patched(embedding) and embedding.max_norm is None
    tied = is_stock and getattr(head, "weight", None) is embedding.weight
    if not tied or embedding.scale_grad_by_freq or embedding.sparse or not embedding.weight.requires_grad:
        return False
    patch_forward(embedding, _embedding_forward)
    return True


def _embedding_forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
    applies = torch.is_grad_enabled() and ids.device.type == "cpu" and is_whole(self.weight)
    if not applies or self.weight.dtype not in (torch.float32, torch.float64):  # 16 bits would round differently
        return self.stock_forward(ids)
    return _Rows.apply(ids, self.weight, self.padding_idx)


class _Rows(AutogradFunction):
    """weight[ids], with weight [vocabulary, size]; its gradient is added to the head's."""

    @staticmethod
    def forward(ctx: Any, ids, weight, padding_idx) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (ids,) = ctx.saved_tensors
        tokens, rows = occurring_rows(ids.flatten(), grad.flatten(0, -2))
        if ctx.padding_idx is not None:
            rows.masked_fill_((tokens == ctx.padding_idx)[:, None], 0)

        def add(gradient: torch.Tensor | None) -> torch.Tensor:
            hook.remove()
            if gradient is None:
                raise RuntimeError("the embedding has a gradient and the head, to which it is tied, has none")
            # autograd asks hooks not to change their argument; a copy is what this module avoids, and nothing else
            # refers to the summed gradient of a leaf before the leaf gets it
            return gradient.index_add_(0, tokens, rows)

        # the leaf's gradient waits for this function too, so the hook is registered before the sum is complete
        hook = ctx.weight.register_hook(add)
        return None, None, None


def occurring_rows(ids: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct tokens of `ids` [positions], and the sums of their rows of `grad` [positions, size]."""
    tokens, indices = ids.unique(return_inverse=True)
    return tokens, grad.new_zeros(len(tokens), grad.shape[1]).index_add_(0, indices, grad)
