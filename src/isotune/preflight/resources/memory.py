"""The memory of a process under every engine, by part.

Weights, gradients and optimizer state are counted tensor by tensor, as the engine shards them. Activations come from a
traced microbatch. N is the number of processes, T the trained parameters:

    engine      weights             gradients                       optimizer state
    plain       whole               4 T (8 T more: exact)           T
    DDP         whole               as plain, and buckets of 4 T    T
    ZeRO-0      whole               g T                             T
    ZeRO-1      whole               4 T; in bf16 2 T and fp32 sums  T / N, and an fp32 copy of the shard
                                    of 4 T that always exist
    ZeRO-2      whole               4 T; in 16 bits g T and the     the same
                                    fp32 shard, 4 T / N
    ZeRO-3      shards              g T, and the fp32 shard         the same
    FSDP2       shards of rows      4 T during accumulation         T / N

g is 4, in fp16 2, and 2 under ZeRO-0 in bf16 too. With `gradient_reduction: pass` ZeRO-2 and 3 hold shards only.
(Rajbhandari et al. 2020, arXiv:1910.02054; the copy of the shard exists in fp32 training too.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from isotune.config import RunRecipe
from isotune.io.errors import UserError
from isotune.preflight.request import DDP, DEEPSPEED, FSDP
from isotune.preflight.resources.activation_memory import MicrobatchMemory
from isotune.preflight.resources.sharding import EXACT_BYTES, Sharding

GRADIENT_BYTES = 4
# bytes of optimizer state for each parameter; 8-bit optimizers add a scale for each block of 256
STATE_BYTES: Mapping[str, float] = {
    "adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 8, "ademamix": 12, "lion_32bit": 4, "sgd": 0,
    "adagrad": 4, "rmsprop": 4, "adamw_8bit": 2 + 8 / 256, "adamw_bnb_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256, "ademamix_8bit": 3 + 12 / 256, "lion_8bit": 1 + 4 / 256,
    "paged_lion_8bit": 1 + 4 / 256,
}  # fmt: skip
# Memory that allocators keep beyond the requested bytes, as a share of what is allocated and freed in a step. On CPU
# glibc keeps freed blocks of up to 32 MiB (`models.cpu.layers`): measured as resident over live bytes of OPT-350M
# and BERT-base at three lengths.
MARGIN_ON_GPU, MARGIN_ON_CPU = 0.1, {"lora": 0.15, "qlora": 0.15, "full": 0.5}
_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "TB": 10**12, "TiB": 2**40}
PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state",
    "master_copies": "fp32 copies of the shards", "communication": "communication buffers",
    "activations": "activations and loss", "margin": "fragmentation margin",
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of a process, by part (PARTS on the device); `notes` explain parts that contain more than they say."""

    weights: int
    gradients: int
    optimizer: int
    master_copies: int
    communication: int
    activations: int
    margin: int
    in_host_memory: int = 0
    optimized_numel: int = 0
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, int]:
        """Bytes on the device, by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


def estimate_memory(sharding: Sharding, traced: MicrobatchMemory, microbatches: int, *, on_cpu: bool) -> Memory:
    """The peak memory of the process that needs most, with the allocator of the CPU or of a GPU.

    `traced` is the costliest microbatch. A process has so many `microbatches` in a step: from the second on, gradients
    exist during the whole microbatch.
    """
    recipe, model, launch = sharding.recipe, sharding.model, sharding.launch
    zero = launch.zero_stage or 0
    weights = sum(int(sharding.weight_bytes(p) * sharding.local_numel(p) / max(p.numel, 1)) for p in model.parameters)
    optimized = sharding.optimized_numel
    notes: list[str] = []
    gradients = _gradients(sharding, notes)
    communication = 0
    if launch.engine == DDP:
        communication = GRADIENT_BYTES * model.trained_numel
    if launch.engine == DEEPSPEED and zero:
        section = launch.zero_optimization
        bucket = min(int(section.get("reduce_bucket_size", 5e8)), model.trained_numel)
        communication = sharding.reduced_bytes * bucket * (2 if section.get("overlap_comm") else 1)
        if zero == 3:
            communication += sharding.gathered_bytes
            notes.append("communication: gathered weights, and the buckets")
    if launch.engine == FSDP:
        communication = sharding.gathered_bytes + GRADIENT_BYTES * optimized
        notes.append("communication: gathered weights, and the reduced shard of the gradients")
    if sharding.exact_gradients and sharding.shards_gradients:  # a bucket: as it was, in float64, and in integers
        communication += (sharding.gradient_bytes + 2 * EXACT_BYTES) * sharding.exact_bucket_numel
    state = round(optimized * state_bytes(recipe))
    if recipe.training_arguments["optim"] not in STATE_BYTES:
        notes.append("optimizer: factored, estimated as AdamW's, an upper bound")
    master = 4 * optimized if launch.engine == DEEPSPEED and (zero or launch.casts_weights(recipe)) else 0
    host = 0
    if "optimizer" in launch.offload:
        host, state, master = state + master, 0, 0
    if "param" in launch.offload:
        host, weights = host + weights, 0
    # In the first microbatch gradients appear while activations are freed; in a later one they exist from its start.
    activations = traced.activations
    if microbatches == 1 and not sharding.exact_gradients:
        activations = max(traced.with_gradients - sharding.gradient_bytes * model.trained_numel, 0)
    share = MARGIN_ON_CPU[recipe.tune] if on_cpu else MARGIN_ON_GPU
    margin = round(share * (activations + communication + gradients))
    parts = (weights, gradients, state, master, communication, activations, margin)
    return Memory(*parts, in_host_memory=host, optimized_numel=optimized, notes=tuple(notes))


def state_bytes(recipe: RunRecipe) -> float:
    """Bytes of optimizer state for each trained parameter."""
    return STATE_BYTES.get(recipe.training_arguments["optim"], 8)


def _gradients(sharding: Sharding, notes: list[str]) -> int:
    """Peak bytes of gradients on the process that needs most; adds to `notes`."""
    recipe, launch, trained_numel = sharding.recipe, sharding.launch, sharding.model.trained_numel
    shard, whole = GRADIENT_BYTES * sharding.optimized_numel, sharding.summed_bytes * trained_numel
    zero, is_cast = launch.zero_stage or 0, sharding.gradient_bytes == 2
    if zero >= 2 and recipe.gradient_reduction == "pass":
        return shard
    if sharding.exact_gradients and sharding.shards_gradients:
        notes.append(f"gradients: shares of integers of {EXACT_BYTES} bytes with exact_gradients")
        return EXACT_BYTES * sharding.optimized_numel + (shard if zero == 3 else 0)
    if sharding.exact_gradients:
        notes.append(f"gradients: {EXACT_BYTES} more bytes for each trained parameter with exact_gradients")
        return whole + EXACT_BYTES * trained_numel
    if zero == 1 and recipe.bf16 and "optimizer" not in launch.offload:
        notes.append("gradients: DeepSpeed accumulates ZeRO-1's bf16 gradients in fp32, unsharded on every process")
        return whole + shard * launch.world_size
    # in fp32 the shards of ZeRO-1 and 2 are views of the gradients, and two shards exist during the optimizer step
    return whole + shard if zero == 3 or (zero and is_cast) else max(whole, 2 * shard if zero else 0)


def format_bytes(count: float) -> str:
    """Bytes in the largest binary unit that fits."""
    units = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next((f"{count / size:.2f} {unit}" for unit, size in units if count >= size), f"{count:.0f} B")


def parse_bytes(text: str, key: str) -> int:
    """Parse `24GiB` or `80 GB`; raises UserError without a positive number or without a unit of memory."""
    stripped = text.strip()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if stripped.lower().endswith(u.lower())), None)
    try:
        number = float(stripped[: -len(unit)]) if unit else None
    except ValueError:
        number = None
    if unit is None or number is None or not 0 < number * _UNITS[unit] < math.inf:
        raise UserError(f"{key} is '{text}': say a number with a unit, {', '.join(_UNITS)}, such as 24GiB")
    return int(number * _UNITS[unit])
