"""The memory of one process, part by part, under every engine: what is exact, and what is an upper bound, is said.

Weights, gradients and optimizer state are counted tensor by tensor as the engine cuts them. Activations come from a
traced pass. N is the number of processes, T the trained numbers:

    engine      weights             gradients                       optimizer state
    plain       whole               4 T (8 T more: exact)           T
    DDP         whole               plain's, and buckets of 4 T     T
    ZeRO-0      whole               g T                             T
    ZeRO-1      whole               4 T; in bf16 2 T and fp32 sums  T / N, and an fp32 copy of the share
                                    of 4 T that are always there
    ZeRO-2      whole               4 T; in 16 bits 2 T and the     the same
                                    fp32 share, 4 T / N
    ZeRO-3      share of each       g T, and the fp32 share         the same
    FSDP2       share of the rows   4 T while a step adds up        T / N

g is 2 in 16 bits and 4 in fp32. With `gradient_reduction: pass` ZeRO-2 and 3 hold shares only.
(Rajbhandari et al. 2020, arXiv:1910.02054; the copy of the share is made in fp32 training too.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from isotune.config import RunRecipe
from isotune.io.errors import UserError
from isotune.preflight.launches import DDP, DEEPSPEED, FSDP, Launch
from isotune.preflight.resources.activation_memory import PassMemory
from isotune.preflight.resources.communication import (
    EXACT_BYTES,
    exact_gradients,
    gathered_bytes,
    gradient_bytes,
    held_numbers,
    optimized_numbers,
    weight_bytes,
)
from isotune.preflight.resources.model_stats import ModelStats

GRADIENT_BYTES = 4
# bytes that an optimizer keeps for a number; 8-bit ones add a scale for a block of 256
STATE_BYTES: Mapping[str, float] = {
    "adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 8, "ademamix": 12, "lion_32bit": 4, "sgd": 0,
    "adagrad": 4, "rmsprop": 4, "adamw_8bit": 2 + 8 / 256, "adamw_bnb_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256, "ademamix_8bit": 3 + 12 / 256, "lion_8bit": 1 + 4 / 256,
    "paged_lion_8bit": 1 + 4 / 256,
}  # fmt: skip
# What allocators hold beyond what is asked for, as a share of what comes and goes. On CPU glibc keeps freed blocks of
# up to 32 MiB (`models.cpu.speedups`): measured at three lengths of OPT-350M and BERT-base, resident against live.
MARGIN_ON_GPU, MARGIN_ON_CPU = 0.1, {"lora": 0.15, "qlora": 0.15, "full": 0.5}
_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "TB": 10**12, "TiB": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one process, by part; `notes` say what a part holds besides the obvious."""

    weights: int
    gradients: int
    optimizer: int
    master_copies: int
    communication: int
    activations: int
    margin: int
    in_host_memory: int = 0
    optimized_numbers: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def parts(self) -> dict[str, int]:
        """On the device, by name."""
        names = ("weights", "gradients", "optimizer", "master_copies", "communication", "activations", "margin")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.parts.values())


def plan_memory(
    recipe: RunRecipe, launch: Launch, model: ModelStats, traced: PassMemory, passes: int, *, on_cpu: bool
) -> Memory:
    """The fullest moment of a step on the fullest process.

    Args:
        recipe: optimizer, precision, exact_gradients.
        launch: engine and processes.
        model: counted parameters.
        traced: of the costliest pass.
        passes: on one process in a step; in a later one the gradients of the first are there from the beginning.
        on_cpu: whose allocator keeps more.
    """
    zero = launch.zero_stage or 0
    weights = sum(
        int(weight_bytes(p, recipe, launch) * held_numbers(p, launch) / max(p.numbers, 1)) for p in model.parameters
    )
    optimized = optimized_numbers(model, launch)
    notes: list[str] = []
    gradients = _gradients(recipe, model, launch, notes)
    communication = 0
    if launch.engine == DDP:
        communication = GRADIENT_BYTES * model.trained
    if launch.engine == DEEPSPEED and zero:
        section = (launch.deepspeed_config or {}).get("zero_optimization", {})
        bucket = min(int(section.get("reduce_bucket_size", 5e8)), model.trained)
        communication = gradient_bytes(recipe, launch) * bucket * (2 if section.get("overlap_comm") else 1)
        if zero == 3:
            communication += gathered_bytes(recipe, model, launch)
            notes.append("communication: weights gathered whole, beside the buckets")
    if launch.engine == FSDP:
        communication = gathered_bytes(recipe, model, launch) + GRADIENT_BYTES * optimized
        notes.append("communication: weights gathered whole, and the reduced share of the gradients")
    state = round(optimized * STATE_BYTES.get(recipe.training_arguments["optim"], 8))
    if recipe.training_arguments["optim"] not in STATE_BYTES:
        notes.append("optimizer: factored, counted as AdamW's, an upper bound")
    master = 4 * optimized if launch.engine == DEEPSPEED and (zero or launch.casts_weights(recipe)) else 0
    host = 0
    if "optimizer" in launch.offload:
        host, state, master = state + master, 0, 0
    if "param" in launch.offload:
        host, weights = host + weights, 0
    # In a step of one pass the gradients appear while activations go; in a later pass they are all there before.
    activations = traced.activations if passes > 1 or exact_gradients(recipe, launch) else max(
        traced.with_gradients - gradient_bytes(recipe, launch) * model.trained, 0
    )  # fmt: skip
    share = MARGIN_ON_CPU[recipe.tune] if on_cpu else MARGIN_ON_GPU
    margin = round(share * (activations + communication + gradients))
    return Memory(
        weights, gradients, state, master, communication, activations, margin, host, optimized, tuple(notes)
    )  # fmt: skip


def _gradients(recipe: RunRecipe, model: ModelStats, launch: Launch, notes: list[str]) -> int:
    """Bytes of gradients at their most, on the fullest process; `notes` take what is there besides the obvious."""
    own, share = gradient_bytes(recipe, launch), GRADIENT_BYTES * optimized_numbers(model, launch)
    zero = launch.zero_stage or 0
    whole = own * model.trained
    if zero >= 2 and recipe.gradient_reduction == "pass":
        return share
    if exact_gradients(recipe, launch):
        notes.append(f"gradients: {EXACT_BYTES} bytes more a trained number for exact_gradients")
        return whole + EXACT_BYTES * model.trained
    if zero == 1 and recipe.bf16 and "optimizer" not in launch.offload:
        notes.append("gradients: DeepSpeed adds up ZeRO-1's bf16 gradients in fp32, whole on every process")
        return whole + share * launch.world_size
    # fp32 shares of ZeRO-1 and 2 are views of what is there, and both are there while the optimizer steps
    return whole + share if zero == 3 or (zero and own == 2) else max(whole, 2 * share if zero else 0)


def parse_bytes(text: str, key: str) -> int:
    """`24GiB` or `80 GB` in bytes.

    Raises:
        UserError: no number, or no unit of memory.
    """
    stripped = text.strip()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if stripped.lower().endswith(u.lower())), None)
    try:
        number = float(stripped[: -len(unit)]) if unit else None
    except ValueError:
        number = None
    if unit is None or number is None or not number > 0:
        raise UserError(f"{key} is '{text}': say a number with a unit, {', '.join(_UNITS)}, such as 24GiB")
    return int(number * _UNITS[unit])
