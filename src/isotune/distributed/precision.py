"""What `precision: auto` means on a device, and what bf16 costs where a processor only emulates it."""

from typing import Literal

import torch

from isotune.config import RunRecipe
from isotune.distributed.device import choose_device
from isotune.distributed.ranks import least_of_ranks
from isotune.io.errors import UserError

Precision = Literal["bf16", "fp16", "no"]  # by accelerate's names: `no` is fp32
_NUMBER: dict[Precision, int] = {"no": 0, "fp16": 1, "bf16": 2}


def computes_bf16(device: str) -> bool:
    """Whether the device has bf16 instructions; torch emulates them on other CPUs and on older GPUs."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def best_precision(device: str) -> Precision:
    """bf16 where the device has it; else fp16 on a GPU, and fp32."""
    return "bf16" if computes_bf16(device) else "fp16" if device == "cuda" else "no"


def with_precision(recipe: RunRecipe, recorded: dict[str, object]) -> RunRecipe:
    """The recipe with `bf16` and `fp16` in place of `precision: auto`.

    `recorded` are the values of the run that this one goes on with, empty for a new run: what was chosen once is kept
    on any device, because it is part of the result.
    """
    if recipe.precision is None:
        return recipe
    if recorded:
        chosen = {name: recorded.get(name) is True for name in ("bf16", "fp16")}
    else:
        best = best_precision(choose_device(recipe.device))
        chosen = {name: name == best for name in ("bf16", "fp16")}
    return recipe.with_values(precision=None, **chosen)


def check_same_precision(recipe: RunRecipe, device: torch.device) -> None:
    """Refuse ranks whose devices chose another precision. Every rank must call it."""
    number = _NUMBER[recipe.mixed_precision]
    if least_of_ranks(number, device) != -least_of_ranks(-number, device):
        raise UserError("precision: auto is bf16 on some ranks, not on others: say bf16: true, fp16: true or neither")


def cost_of_emulation(recipe: RunRecipe, device: torch.device) -> str | None:
    """The sentence for a bf16 run whose device only emulates it, else None."""
    if not recipe.bf16 or device.type == "mps" or computes_bf16(device.type):
        return None
    what, other = ("GPU", "fp16: true") if device.type == "cuda" else ("processor", "bf16: false, which is fp32,")
    return f"bf16 is emulated on this {what}, several times slower than fp32: {other} is faster, and another experiment"
