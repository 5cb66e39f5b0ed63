"""16-bit copies of fp32 weights, made once an update on a GPU: the weights do not change within it.

Autocast makes them anew in every forward, a launch and a pass over each weight. The gradient of each microbatch reaches
the weight through the same cast, so results are the same bits.
"""

import contextlib
from collections.abc import Iterator

import torch

from isotune.compat.torch import autocast_casts_kept

_kept: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] | None = None  # by id: weight and copy


@contextlib.contextmanager
def kept_casts() -> Iterator[None]:
    """Within it autocast and `kept_cast` cast each weight once. No weight changes, or moves to other memory, within it.

    A forward without a graph leaves copies without one, which a later forward would take over: run none within it
    before that.
    """
    global _kept
    before, _kept = _kept, {}
    try:
        with autocast_casts_kept():
            yield
    finally:
        _kept = before


def kept_cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight.to(dtype)` without a graph: within `kept_casts` the same copy at every call."""
    if _kept is None or weight.dtype == dtype or not weight.is_leaf:  # another tensor at each call
        return weight.to(dtype)
    key = id(weight), dtype
    if key not in _kept:
        _kept[key] = weight, weight.detach().to(dtype)
    return _kept[key][1]
