"""Bytes that the processes exchange in a step, by collective, and the memory that gathered weights take.

N is the number of processes, T the trained parameters, W all parameters, g and w the bytes of an element of gradients
and weights in a collective: 2 where an engine shards 16-bit weights, otherwise those of the tensors.

    engine      all-reduce        reduce-scatter    all-gather, with P microbatches on a process
    DDP         g T
    ZeRO-0      g T
    ZeRO-1, 2   g T                                 w T, the updated weights (with the padding of the groups)
    ZeRO-3                        g T               P times the released weights, the persistent weights once
    FSDP2                         g T               P times w W, and w times the blocks' weights again for backward

docs/plan.md says why. exact_gradients reduces integers of 8 bytes. Losses, norms and buffers, some hundred bytes, are
left out. `tests/distributed/test_communication.py` counts all of this in real steps.
"""

from dataclasses import dataclass

from isotune.config import RunRecipe
from isotune.preflight.request import DDP, FSDP, PLAIN, Launch
from isotune.preflight.resources.model_stats import ModelStats, Parameter

EXACT_BYTES = 8
ALIGNMENT = 2  # DeepSpeed pads each flat group to a multiple of twice the number of processes
# DeepSpeed's defaults
_PERSISTENCE_THRESHOLD, _REUSE_DISTANCE = 10**5, 10**9


@dataclass(frozen=True)
class Sharding:
    """How the processes of a launch hold and exchange the tensors of a recipe's model."""

    recipe: RunRecipe
    model: ModelStats
    launch: Launch

    @property
    def exact_gradients(self) -> bool:
        """Whether the run sums gradients as integers."""
        return self.recipe.sums_exactly(plain_or_ddp=self.launch.engine in (PLAIN, DDP))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient's element, in the type of the trained weights.

        DeepSpeed casts these to 16 bits, except adapters under ZeRO-3, whose base weights are sharded before.
        """
        is_cast = self.launch.casts_weights(self.recipe)
        return 2 if is_cast and not (self.launch.zero_stage == 3 and self.recipe.tune != "full") else 4

    def weight_bytes(self, parameter: Parameter) -> int:
        """Bytes of a whole parameter in memory."""
        return self.gradient_bytes * parameter.numel if parameter.trained else parameter.bytes

    def local_numel(self, p: Parameter) -> int:
        """Elements of a parameter in the largest shard between two steps."""
        n = self.launch.world_size
        if self.launch.engine == FSDP:
            return -(-p.rows // n) * (p.numel // max(p.rows, 1))
        return -(-p.numel // n) if self.launch.zero_stage == 3 else p.numel

    @property
    def optimized_numel(self) -> int:
        """Elements that the optimizer of the largest shard updates, padding included."""
        trained = [p for p in self.model.parameters if p.trained]
        n, zero = self.launch.world_size, self.launch.zero_stage
        if self.launch.engine == FSDP or zero == 3:
            return sum(map(self.local_numel, trained))
        if not zero:
            return self.model.trained_numel
        groups = [sum(p.numel for p in trained if p.decayed is decayed) for decayed in (True, False)]
        return sum(-(-group // (ALIGNMENT * n)) * ALIGNMENT for group in groups)

    def collectives(self, microbatches: int) -> dict[str, int]:
        """Bytes of the whole tensors that a step with so many microbatches on a process sends, by collective."""
        recipe, model, launch, zero = self.recipe, self.model, self.launch, self.launch.zero_stage
        if launch.world_size == 1:
            return {}
        reductions = microbatches if recipe.gradient_reduction == "pass" and zero in (2, 3) else 1
        if launch.engine == FSDP:
            is_16_bit = recipe.bf16 or recipe.fp16  # FSDP2 casts all that it sends to that type
            gathered = 2 * (model.numel + model.block_numel) if is_16_bit else model.bytes + model.block_bytes
            sent = (2 if is_16_bit else 4) * model.trained_numel
            return {"reduce_scatter": sent, "all_gather": microbatches * gathered}
        if zero == 3:
            persistent, others = self._by_persistence
            gathered = persistent + microbatches * (others + round(others * (1 - self._kept_share)))
            sent = (2 if launch.casts_weights(recipe) else 4) * model.trained_numel * reductions
            return {"reduce_scatter": sent, "all_gather": gathered}
        sent = EXACT_BYTES * model.trained_numel if self.exact_gradients else 0
        if not self.exact_gradients or zero:
            sent += self.gradient_bytes * model.trained_numel * reductions
        gathered = self.gradient_bytes * launch.world_size * self.optimized_numel
        return {"all_reduce": sent, "all_gather": gathered} if zero else {"all_reduce": sent}

    def bytes_sent(self, microbatches: int) -> float:
        """Bytes that a process sends, and also receives, in a step with ring collectives.

        A ring passes (N - 1) / N of a tensor on in a reduce-scatter and in an all-gather; an all-reduce is both.
        """
        sent, n = self.collectives(microbatches), self.launch.world_size
        return (n - 1) / n * (2 * sent.get("all_reduce", 0) + sent.get("reduce_scatter", 0) + sent.get("all_gather", 0))

    @property
    def gathered_bytes(self) -> int:
        """Peak bytes of gathered weights under a sharding engine, in addition to the shards."""
        model, two_blocks = self.model, 2 * self.model.largest_block_bytes
        if self.launch.engine == FSDP:
            outside = model.bytes - model.block_bytes  # the root's own weights stay gathered for the whole forward
            cast = 2 * model.numel / model.bytes if self.recipe.bf16 or self.recipe.fp16 else 1.0
            return round(cast * (outside + two_blocks))
        persistent, others = self._by_persistence
        return persistent + min(others, round(others * self._kept_share) + two_blocks)

    @property
    def _by_persistence(self) -> tuple[int, int]:
        """Bytes of ZeRO-3's persistent weights, which are small and stay whole, and of all others."""
        section, parameters = self.launch.zero_optimization, self.model.parameters
        threshold = int(section.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD))
        small = sum(self.weight_bytes(p) for p in parameters if p.numel <= threshold)
        return small, sum(map(self.weight_bytes, parameters)) - small

    @property
    def _kept_share(self) -> float:
        """The share of the weights that ZeRO-3 keeps from forward to backward.

        Between its two uses, the weights after it in the model are used twice; with gradient checkpointing three times.
        """
        distance = float(self.launch.zero_optimization.get("stage3_max_reuse_distance", _REUSE_DISTANCE))
        times = 3 if self.recipe.training_arguments.get("gradient_checkpointing") else 2
        return min(1.0, distance / times / max(self.model.numel, 1))
