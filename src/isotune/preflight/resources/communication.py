"""What the processes of one step hand to each other, collective by collective, and what they hold for it.

N is the number of processes, T the trained numbers, W all weights, g and w bytes a number as they travel: 2 where an
engine shards 16-bit weights, else those of the tensors.

    engine      all-reduce        reduce-scatter    all-gather, with P passes on a process
    DDP         g T
    ZeRO-0      g T
    ZeRO-1, 2   g T                                 w T, the updated weights (padded as the groups are)
    ZeRO-3                        g T               P times what is no longer there, the persistent weights once
    FSDP2                         g T               P times w W, and again w times the blocks' weights to go backward

ZeRO-1 and 2 all-reduce whole gradients, of which a process then keeps its share: that is what DeepSpeed 0.19 does, and
half as much again as the reduce-scatter of the paper. Under ZeRO-3 a weight is gathered again on the way back only
where `stage3_max_reuse_distance` numbers lie between its two uses; below that it stays, which is less to send and more
to hold. With exact_gradients integers of 8 bytes are reduced. `tests/distributed/test_communication.py` counts all of
this in real steps. Left out: losses, norms and buffers, some hundred bytes.
"""

from collections.abc import Mapping
from typing import Any

from isotune.config import RunRecipe
from isotune.preflight.launches import DDP, FSDP, PLAIN, Launch
from isotune.preflight.resources.model_stats import ModelStats, Parameter

EXACT_BYTES = 8
ALIGNMENT = 2  # DeepSpeed pads each flat group to a multiple of twice the processes
# DeepSpeed's own values where its file says none
_PERSISTENCE_THRESHOLD, _REUSE_DISTANCE = 10**5, 10**9


def exact_gradients(recipe: RunRecipe, launch: Launch) -> bool:
    """Whether the run would sum gradients as integers."""
    return recipe.sums_exactly(plain_or_ddp=launch.engine in (PLAIN, DDP))


def gradient_bytes(recipe: RunRecipe, launch: Launch) -> int:
    """Of one number of a gradient, as the backward pass makes it: of the type of the trained weights.

    DeepSpeed turns these into 16 bits, but for adapters on weights that were already in shares when it came.
    """
    return 2 if launch.casts_weights(recipe) and not (launch.zero_stage == 3 and recipe.tune != "full") else 4


def weight_bytes(parameter: Parameter, recipe: RunRecipe, launch: Launch) -> int:
    """Of a whole parameter in memory."""
    return gradient_bytes(recipe, launch) * parameter.numbers if parameter.trained else parameter.bytes


def optimized_numbers(model: ModelStats, launch: Launch) -> int:
    """Numbers that the optimizer of the fullest process updates, padding included."""
    trained = [p for p in model.parameters if p.trained]
    n, zero = launch.world_size, launch.zero_stage
    if launch.engine == FSDP or zero == 3:
        return sum(held_numbers(p, launch) for p in trained)
    if not zero:
        return model.trained
    groups = [sum(p.numbers for p in trained if p.decayed is decayed) for decayed in (True, False)]
    return sum(-(-group // (ALIGNMENT * n)) * ALIGNMENT for group in groups)


def held_numbers(p: Parameter, launch: Launch) -> int:
    """Numbers of a parameter on the fullest process between two steps."""
    if launch.engine == FSDP:
        return -(-p.rows // launch.world_size) * (p.numbers // max(p.rows, 1))
    return -(-p.numbers // launch.world_size) if launch.zero_stage == 3 else p.numbers


def collectives(recipe: RunRecipe, model: ModelStats, launch: Launch, passes: int) -> dict[str, int]:
    """Bytes of the whole tensors that one step reduces, scatters and gathers, by the collective's name.

    Args:
        passes: on one process in a step.
    """
    sent: dict[str, int] = {}
    if launch.world_size == 1:
        return sent
    zero = launch.zero_stage
    gradients = gradient_bytes(recipe, launch) * model.trained
    if launch.engine == FSDP:
        halves = recipe.bf16 or recipe.fp16  # all that travels is of one type
        sent["reduce_scatter"] = (2 if halves else 4) * model.trained
        again = 2 * (model.numbers + model.block_numbers) if halves else model.bytes + model.block_bytes
        sent["all_gather"] = passes * again
        return sent
    if zero == 3:
        persistent, others = _by_persistence(recipe, model, launch)
        repeated = round(others * (1 - _kept_share(recipe, model, launch)))
        travelling = 2 if launch.casts_weights(recipe) else 4
        sent["reduce_scatter"] = travelling * model.trained * (passes if recipe.gradient_reduction == "pass" else 1)
        sent["all_gather"] = persistent + passes * (others + repeated)
        return sent
    exact = exact_gradients(recipe, launch)
    sent["all_reduce"] = EXACT_BYTES * model.trained if exact else 0
    if not exact or zero:
        sent["all_reduce"] += gradients * (passes if zero == 2 and recipe.gradient_reduction == "pass" else 1)
    if zero:
        sent["all_gather"] = gradient_bytes(recipe, launch) * launch.world_size * optimized_numbers(model, launch)
    return sent


def bytes_sent(recipe: RunRecipe, model: ModelStats, launch: Launch, passes: int) -> float:
    """What a process sends, and receives as much, in a step by rings: an all-reduce is a scatter and a gather.

    A ring hands (N - 1) / N of a tensor on in each of them.
    """
    sent = collectives(recipe, model, launch, passes)
    n = launch.world_size
    return (n - 1) / n * (2 * sent.get("all_reduce", 0) + sent.get("reduce_scatter", 0) + sent.get("all_gather", 0))


def gathered_bytes(recipe: RunRecipe, model: ModelStats, launch: Launch) -> int:
    """Weights that a sharding engine holds whole at the fullest moment of a pass, beside the shares."""
    two_blocks = 2 * model.largest_block_bytes
    if launch.engine == FSDP:
        outside = model.bytes - model.block_bytes  # the root's own stay from the first product to the last
        halves = 2 * model.numbers / model.bytes if recipe.bf16 or recipe.fp16 else 1.0
        return round(halves * (outside + two_blocks))
    persistent, others = _by_persistence(recipe, model, launch)
    return persistent + min(others, round(others * _kept_share(recipe, model, launch)) + two_blocks)


def _by_persistence(recipe: RunRecipe, model: ModelStats, launch: Launch) -> tuple[int, int]:
    """Bytes of the weights that ZeRO-3 leaves whole because they are small, and of all others."""
    threshold = int(_section(launch).get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD))
    small = sum(weight_bytes(p, recipe, launch) for p in model.parameters if p.numbers <= threshold)
    return small, sum(weight_bytes(p, recipe, launch) for p in model.parameters) - small


def _kept_share(recipe: RunRecipe, model: ModelStats, launch: Launch) -> float:
    """The share of the weights that ZeRO-3 keeps from the way forward to the way back.

    From a weight's use to its next, what lies behind it in the model is passed twice, and three times where the way
    back computes blocks again.
    """
    distance = float(_section(launch).get("stage3_max_reuse_distance", _REUSE_DISTANCE))
    times = 3 if recipe.training_arguments.get("gradient_checkpointing") else 2
    return min(1.0, distance / times / max(model.numbers, 1))


def _section(launch: Launch) -> Mapping[str, Any]:
    return (launch.deepspeed_config or {}).get("zero_optimization", {})
