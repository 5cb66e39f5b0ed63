"""Kernels that a CPU lacks, on the virtual device: the same functions in fp32, and the checks of their arguments."""

import contextlib
import ctypes
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import torch

from tests.virtual_cuda import device

_deterministic: list[bool] = []
_registered: list[torch.library.Library] = []


def register() -> None:
    """Give the virtual device `aten::_flash_attention_forward`, its backward, and sums of 16-bit products in fp32."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CUDA")
    library.impl("_flash_attention_backward", _backward, "CUDA")
    library.impl("addmm.dtype_out", _product_added, "CUDA")
    _registered.append(library)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor) -> None:
    for tensor in (query, key, value):
        if tensor.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"FlashAttention only supports fp16 and bf16 data types, not {tensor.dtype}")
        if tensor.stride(-1) != 1 or tensor.shape[-1] % 8 or tensor.shape[-1] > 256 or tensor.dim() != 3:
            raise RuntimeError(f"FlashAttention does not take {list(tensor.shape)} with strides {tensor.stride()}")
    if not query.dtype == key.dtype == value.dtype or query.shape[1] % key.shape[1]:
        raise RuntimeError("query, key and value must have the same dtype, and heads that divide")
    if bounds.dtype != torch.int32 or not bounds.is_cuda:
        raise RuntimeError("cum_seq must be int32 on the device")


def _probabilities(query, key, causal, scale):
    """Of one document, query and key [heads, tokens, size] in fp32."""
    scores = query @ key.transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1)


def _documents(bounds: torch.Tensor) -> list[slice]:
    """The documents, read from the device's memory as a kernel does, which nobody waits for."""
    assert bounds.is_contiguous()
    places = (ctypes.c_int32 * bounds.numel()).from_address(bounds.data_ptr())
    return [slice(start, stop) for start, stop in pairwise(places) if stop > start]


def was_deterministic() -> bool | None:
    """Whether the last backward pass was asked for a fixed order of sums; None before the first. Forgets it."""
    last = _deterministic[-1] if _deterministic else None
    _deterministic.clear()
    return last


def _forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options):
    _check(query, key, value, cum_seq_q)
    device.note("launch", "flash_forward")
    assert dropout_p == 0.0, "the virtual kernel has no dropout"
    with device.quiet():
        out = _attended(query, key, value, cum_seq_q, is_causal, options["scale"])
        lse = torch.zeros(query.shape[1], query.shape[0], device=query.device)
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return out, lse, unused, unused.clone(), torch.empty(0, device=query.device)


def _attended(query, key, value, bounds, causal, scale):
    group, out = query.shape[1] // key.shape[1], torch.empty_like(query)
    for part in _documents(bounds):
        q, k, v = (t[part].transpose(0, 1).float() for t in (query, key, value))
        k, v = (t.repeat_interleave(group, 0) for t in (k, v))
        out[part] = (_probabilities(q, k, causal, scale) @ v).transpose(0, 1).to(out.dtype)
    return out


def _backward(grad, query, key, value, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng, unused,
              *, scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
    device.note("launch", "flash_backward")
    _deterministic.append(torch.are_deterministic_algorithms_enabled())
    with device.quiet():
        return _attended_backward(grad, query, key, value, cum_seq_q, is_causal, scale)


def _attended_backward(grad, query, key, value, cum_seq_q, is_causal, scale):
    group, grads = query.shape[1] // key.shape[1], [torch.zeros_like(t) for t in (query, key, value)]
    for part in _documents(cum_seq_q):
        q, k, v, g = (t[part].transpose(0, 1).float() for t in (query, key, value, grad))
        k, v = (t.repeat_interleave(group, 0) for t in (k, v))
        p = _probabilities(q, k, is_causal, scale)
        d = g @ v.transpose(-1, -2)
        d = p * (d - (d * p).sum(-1, keepdim=True)) * scale
        found = d @ k, d.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g
        for place, total in zip(grads, found, strict=True):
            heads = total if place is grads[0] else total.unflatten(0, (-1, group)).sum(1)
            place[part] = heads.transpose(0, 1).to(place.dtype)
    return tuple(grads)


def _product_added(total, one, other, out_dtype, *, beta=1, alpha=1, out):
    if not (one.dtype == other.dtype != out_dtype == out.dtype == total.dtype == torch.float32):
        raise RuntimeError("out_dtype must be fp32 for fp16/bf16 inputs, and the sum's")
    device.note("launch", "aten::addmm")
    with device.quiet():
        product = one.float() @ other.float() * alpha
        return out.copy_(product + total * beta if beta else product)


@contextlib.contextmanager
def of_triton() -> Iterator[None]:
    """Within it dropout and the loss head have their kernels, as on a GPU with triton: here the functions below."""
    from isotune.models.cuda import dropout, loss_head

    with (
        mock.patch.object(dropout, "_triton_kernel", lambda device: dropped if device.type == "cuda" else None),
        mock.patch.object(loss_head, "triton_kernel", lambda d: loss_into_gradient if d.type == "cuda" else None),
    ):
        yield


def loss_into_gradient(logits, targets, bias, losses, factor, cap, scale, with_gradient):
    """`run` of the loss head's Triton kernel, which is one launch, by autograd."""
    device.note("launch", "triton_loss")
    with device.quiet(), torch.enable_grad():
        given = logits.float() if bias is None else logits.float() + bias
        given = given.detach().requires_grad_()
        changed = given * factor if cap is None else cap * torch.tanh(given * factor / cap)
        lost = torch.nn.functional.cross_entropy(changed, targets, reduction="none")
        losses.copy_(lost.detach())
        if with_gradient:
            logits.copy_(torch.autograd.grad(lost.sum(), given)[0] * scale)


def dropped(input, numbers, positions, call, threshold, scale):
    """`run` of dropout's Triton kernel, which is one launch: the torch form of the same hash, by line."""
    from isotune.models.cuda import dropout
    from isotune.models.document_keys import ELEMENTS_PER_WORD, RESOLUTION

    device.note("launch", "triton_dropout")
    with device.quiet():
        keys = dropout._next_keys(dropout._next_keys(call, numbers), positions)
        features = input.shape[-1]
        words = dropout._mixed(keys.view(-1, 1), torch.arange(-(-features // ELEMENTS_PER_WORD), device=input.device))
        kept = words.view(torch.int16)[:, :features].int() >= threshold - RESOLUTION // 2
        return torch.where(kept.view(input.shape), input * scale, 0.0)
