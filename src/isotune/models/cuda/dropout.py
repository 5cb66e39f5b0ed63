"""Dropout on a GPU: the masks of document_keys.py, computed where they are used, forward and backward, never stored."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from isotune.compat.torch import AutogradFunction
from isotune.models.cuda.triton_driver import triton_runs
from isotune.models.document_keys import (
    ELEMENTS_PER_WORD,
    HALF,
    INCREMENT,
    LAST_SHIFT,
    RESOLUTION,
    ROUNDS,
    MicrobatchDocuments,
    draw_call_key,
    hashed,
    quantised_drop,
    required_documents,
)


def dropout(input: torch.Tensor, p: float) -> torch.Tensor:
    """Set elements of a floating-point tensor to zero with probability `p` and divide the others by 1 - `p`.

    `p` is rounded to 1/65536; at 0 the input itself is returned, at 1 all elements are zero. It needs
    `known_documents`, and does not wait for the device.
    """
    threshold, scale = quantised_drop(p)
    if threshold == 0:
        return input
    call = int(hashed(np.array([draw_call_key()], np.uint64))[0])
    return _Dropout.apply(input, required_documents(), _signed(call), threshold, scale)


class _Dropout(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, *mask: Any) -> torch.Tensor:
        ctx.mask = mask
        return _dropped(input, *mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return _dropped(grad, *ctx.mask), None, None, None, None


def _dropped(
    input: torch.Tensor, documents: MicrobatchDocuments, call: int, threshold: int, scale: float
) -> torch.Tensor:
    by_token, inner = documents.axes(input.shape)
    run = _triton_kernel(input.device)
    if run is not None and len(inner) == (0 if by_token else 1):
        numbers, positions = _places(documents, by_token, inner[0] if inner else 0, input.device)
        return run(input.contiguous(), numbers, positions, call, threshold, scale)
    kept = kept_elements(input.shape, documents, call, threshold, input.device)
    return torch.where(kept, input * scale, 0.0)


def kept_elements(
    shape: Sequence[int], documents: MicrobatchDocuments, call: int, threshold: int, device: torch.device
) -> torch.Tensor:
    """Which elements are kept, bool of this shape, in torch's operators; `call` is the hash of the call's key."""
    by_token, inner = documents.axes(shape)
    numbers, positions = _places(documents, by_token, 1, device)
    keys = _next_keys(call, numbers)
    if by_token:
        keys = _next_keys(keys, positions)
    for length in inner:
        keys = _next_keys(keys[..., None], torch.arange(length, device=device))
    words = _mixed(keys.view(-1, 1), torch.arange(-(-shape[-1] // ELEMENTS_PER_WORD), device=device))
    numbers_16 = words.view(torch.int16)[:, : shape[-1]]
    return (numbers_16.int() >= threshold - RESOLUTION // 2).view(tuple(shape))


def _next_keys(keys: torch.Tensor | int, indices: torch.Tensor) -> torch.Tensor:
    x = (indices + 1) * _signed(INCREMENT) + keys
    for shift, factor in ROUNDS:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, LAST_SHIFT)


def _mixed(keys: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    (_, first), (_, second) = ROUNDS
    x = (keys ^ (indices + 1) * _signed(INCREMENT)) * _signed(first)
    return (x ^ _shifted(x, HALF)) * _signed(second)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The bits of int64 numbers moved right, filled with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64."""
    return number - 2**64 if number >= 2**63 else number


@functools.lru_cache(maxsize=4)  # the kinds of one microbatch, once each
def _places(
    documents: MicrobatchDocuments, by_token: bool, per_document: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`MicrobatchDocuments.places` on a device: computed there of what it has already, or copied to it."""
    if documents.on_device is not None and documents.on_device.device == device:
        numbers, lengths = documents.on_device
        if not by_token:
            positions = torch.arange(per_document, device=device).repeat(len(numbers))
            return numbers.repeat_interleave(per_document), positions
        total = sum(documents.lengths)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=total)
        positions = torch.arange(total, device=device) - starts
        return numbers.repeat_interleave(lengths, output_size=total), positions
    places = torch.from_numpy(np.stack(documents.places(by_token, per_document)))
    if device.type == "cuda":
        places = places.pin_memory()  # the copy then waits for nothing
    numbers, positions = places.to(device, non_blocking=True)
    return numbers, positions


def _triton_kernel(device: torch.device) -> Callable[..., torch.Tensor] | None:
    """`run` of the Triton kernel; None on another device, or where Triton cannot run."""
    if device.type != "cuda" or not triton_runs():
        return None
    from isotune.models.cuda.triton_dropout import run

    return run
