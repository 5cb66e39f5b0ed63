"""Bytes that the processes exchange in a step, by collective, and the memory that gathered weights take.

N is the number of processes, T the trained parameters, W all parameters, g and w the bytes of an element of gradients
and weights in a collective: 2 where an engine shards 16-bit weights, otherwise those of the tensors.

    engine      all-reduce        reduce-scatter    all-gather, with P microbatches on a process
    DDP         g T
    ZeRO-0      g T
    ZeRO-1, 2   g T                                 w T, the updated weights (with the padding of the groups)
    ZeRO-3                        g T               P times the released weights, the persistent weights once
    FSDP2                         g T               P times w W, and w times the blocks' weights again for backward

ZeRO-1 and 2 all-reduce whole gradients, and a process then keeps its shard: so does DeepSpeed 0.19, with half as many
bytes again as the reduce-scatter of the paper. ZeRO-3 gathers a weight again for backward only where more than
`stage3_max_reuse_distance` elements are used in between; otherwise it keeps the weight, which sends less and needs more
memory. exact_gradients reduces integers of 8 bytes. `tests/distributed/test_communication.py` counts all of this in
real steps. Losses, norms and buffers, some hundred bytes, are left out.
"""

from isotune.config import RunRecipe
from isotune.preflight.request import DDP, FSDP, PLAIN, Launch
from isotune.preflight.resources.model_stats import ModelStats, Parameter

EXACT_BYTES = 8
ALIGNMENT = 2  # DeepSpeed pads each flat group to a multiple of twice the number of processes
# DeepSpeed's defaults
_PERSISTENCE_THRESHOLD, _REUSE_DISTANCE = 10**5, 10**9


def exact_gradients(recipe: RunRecipe, launch: Launch) -> bool:
    """Whether the run sums gradients as integers."""
    return recipe.sums_exactly(plain_or_ddp=launch.engine in (PLAIN, DDP))


def gradient_bytes(recipe: RunRecipe, launch: Launch) -> int:
    """Bytes of a gradient's element, in the type of the trained weights.

    DeepSpeed casts these to 16 bits, except adapters under ZeRO-3, whose base weights are sharded before.
    """
    return 2 if launch.casts_weights(recipe) and not (launch.zero_stage == 3 and recipe.tune != "full") else 4


def weight_bytes(parameter: Parameter, recipe: RunRecipe, launch: Launch) -> int:
    """Bytes of a whole parameter in memory."""
    return gradient_bytes(recipe, launch) * parameter.numel if parameter.trained else parameter.bytes


def optimized_numel(model: ModelStats, launch: Launch) -> int:
    """Elements that the optimizer of the largest shard updates, padding included."""
    trained = [p for p in model.parameters if p.trained]
    n, zero = launch.world_size, launch.zero_stage
    if launch.engine == FSDP or zero == 3:
        return sum(local_numel(p, launch) for p in trained)
    if not zero:
        return model.trained_numel
    groups = [sum(p.numel for p in trained if p.decayed is decayed) for decayed in (True, False)]
    return sum(-(-group // (ALIGNMENT * n)) * ALIGNMENT for group in groups)


def local_numel(p: Parameter, launch: Launch) -> int:
    """Elements of a parameter in the largest shard between two steps."""
    if launch.engine == FSDP:
        return -(-p.rows // launch.world_size) * (p.numel // max(p.rows, 1))
    return -(-p.numel // launch.world_size) if launch.zero_stage == 3 else p.numel


def collectives(recipe: RunRecipe, model: ModelStats, launch: Launch, microbatches: int) -> dict[str, int]:
    """Bytes of the whole tensors that one step with so many microbatches on a process sends, by collective."""
    if launch.world_size == 1:
        return {}
    zero = launch.zero_stage
    reductions = microbatches if recipe.gradient_reduction == "pass" and zero in (2, 3) else 1
    if launch.engine == FSDP:
        is_16_bit = recipe.bf16 or recipe.fp16  # FSDP2 casts all that it sends to that type
        gathered = 2 * (model.numel + model.block_numel) if is_16_bit else model.bytes + model.block_bytes
        return {
            "reduce_scatter": (2 if is_16_bit else 4) * model.trained_numel,
            "all_gather": microbatches * gathered,
        }
    if zero == 3:
        persistent, others = _by_persistence(recipe, model, launch)
        repeated = round(others * (1 - _kept_share(recipe, model, launch)))
        element_bytes = 2 if launch.casts_weights(recipe) else 4
        return {
            "reduce_scatter": element_bytes * model.trained_numel * reductions,
            "all_gather": persistent + microbatches * (others + repeated),
        }
    exact = exact_gradients(recipe, launch)
    sent = {"all_reduce": EXACT_BYTES * model.trained_numel if exact else 0}
    if not exact or zero:
        sent["all_reduce"] += gradient_bytes(recipe, launch) * model.trained_numel * reductions
    if zero:
        sent["all_gather"] = gradient_bytes(recipe, launch) * launch.world_size * optimized_numel(model, launch)
    return sent


def bytes_sent(recipe: RunRecipe, model: ModelStats, launch: Launch, microbatches: int) -> float:
    """Bytes that a process sends, and also receives, in a step with ring collectives.

    A ring passes (N - 1) / N of a tensor on in a reduce-scatter and in an all-gather; an all-reduce is both.
    """
    sent = collectives(recipe, model, launch, microbatches)
    n = launch.world_size
    return (n - 1) / n * (2 * sent.get("all_reduce", 0) + sent.get("reduce_scatter", 0) + sent.get("all_gather", 0))


def gathered_bytes(recipe: RunRecipe, model: ModelStats, launch: Launch) -> int:
    """Peak bytes of gathered weights under a sharding engine, in addition to the shards."""
    two_blocks = 2 * model.largest_block_bytes
    if launch.engine == FSDP:
        outside = model.bytes - model.block_bytes  # the root module's own weights stay gathered for the whole forward
        cast = 2 * model.numel / model.bytes if recipe.bf16 or recipe.fp16 else 1.0
        return round(cast * (outside + two_blocks))
    persistent, others = _by_persistence(recipe, model, launch)
    return persistent + min(others, round(others * _kept_share(recipe, model, launch)) + two_blocks)


def _by_persistence(recipe: RunRecipe, model: ModelStats, launch: Launch) -> tuple[int, int]:
    """Bytes of ZeRO-3's persistent weights, which are small and stay whole, and of all others."""
    threshold = int(launch.zero_optimization.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD))
    small = sum(weight_bytes(p, recipe, launch) for p in model.parameters if p.numel <= threshold)
    return small, sum(weight_bytes(p, recipe, launch) for p in model.parameters) - small


def _kept_share(recipe: RunRecipe, model: ModelStats, launch: Launch) -> float:
    """The share of the weights that ZeRO-3 keeps from forward to backward.

    Between its two uses, the weights after it in the model are used twice, and three times with gradient checkpointing.
    """
    distance = float(launch.zero_optimization.get("stage3_max_reuse_distance", _REUSE_DISTANCE))
    times = 3 if recipe.training_arguments.get("gradient_checkpointing") else 2
    return min(1.0, distance / times / max(model.numel, 1))
