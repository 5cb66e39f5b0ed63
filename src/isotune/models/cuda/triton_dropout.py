"""The Triton kernel of dropout by document. Importing it needs triton, which comes with torch for CUDA."""

from typing import Any

import torch
import triton
import triton.language as tl

from isotune.models.document_keys import INCREMENT

ROWS, COLUMNS = 4, 256
_INCREMENT = tl.constexpr(INCREMENT)


@triton.jit
def _next_key(key, index):
    # the hash of document_keys.py, whose numbers a kernel cannot read from a tuple
    x = key + (index.to(tl.uint64) + 1) * _INCREMENT
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mixed(key, index):
    x = (key ^ (index.to(tl.uint64) + 1) * _INCREMENT) * 0xBF58476D1CE4E5B9
    return (x ^ (x >> 32)) * 0x94D049BB133111EB


@triton.jit(do_not_specialize=["call", "threshold"])
def _kernel(
    input, output, numbers, positions, call, lines, features, threshold, scale,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * rows + tl.arange(0, rows)
    feature = tl.program_id(1) * columns + tl.arange(0, columns)
    present = line < lines
    key = _next_key(call.to(tl.uint64), tl.load(numbers + line, mask=present, other=0))
    key = _next_key(key, tl.load(positions + line, mask=present, other=0))
    words = _mixed(key[:, None], (feature // 4)[None, :])
    number = (words >> ((feature % 4) * 16).to(tl.uint64)[None, :]).to(tl.int32) & 0xFFFF
    kept = ((number + 32768) & 0xFFFF) >= threshold
    place = line.to(tl.int64)[:, None] * features + feature[None, :]
    inside = present[:, None] & (feature < features)[None, :]
    value = tl.load(input + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + place, tl.where(kept, value * scale, 0.0).to(output.dtype.element_ty), mask=inside)


def run(
    input: torch.Tensor, numbers: torch.Tensor, positions: torch.Tensor, call: int, threshold: int, scale: float
) -> torch.Tensor:
    """`input` [lines, ..., features], contiguous, with the elements dropped that the hash drops; the others scaled.

    `numbers` and `positions` are int64 [lines], `call` the hash of the call's key as an int64.
    """
    output, lines, features = torch.empty_like(input), len(numbers), input.shape[-1]
    grid = (triton.cdiv(lines, ROWS), triton.cdiv(features, COLUMNS))
    kernel: Any = _kernel
    kernel[grid](input, output, numbers, positions, call, lines, features, threshold, scale, ROWS, COLUMNS)
    return output
