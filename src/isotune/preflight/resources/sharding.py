"""The tensors of a recipe's model, and how the processes of a launch hold and exchange them in a step.

The model is built on the meta device, from its configuration alone. In the table of what is exchanged N is the number
of processes, T the trained parameters, W all parameters, g and w the bytes of an element of gradients and weights in a
collective. w is 2 where an engine shards 16-bit weights, otherwise that of the tensors; g is 4, and 2 in DeepSpeed's
fp16.

    engine      all-reduce        reduce-scatter    all-gather, with P microbatches on a process
    DDP         g T
    ZeRO-0      g T
    ZeRO-1, 2   g T                                 w T, the updated weights (with the padding of the groups)
    ZeRO-3                        g T               P times the released weights, the persistent weights once
    FSDP2                         g T               P times w W, and w times the blocks' weights again for backward

exact_gradients reduces integers of 8 bytes, P times under ZeRO-3 and FSDP2. Losses, norms and buffers, some hundred
bytes, are left out. docs/plan.md has the reasons, and `tests/distributed/test_communication.py` counts all of this in
real steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.trainer_pt_utils import get_parameter_names

from isotune.compat.deepspeed import whole_models
from isotune.compat.peft import base_model_of
from isotune.compat.transformers import attention_of
from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.models.adapters.lora import add_adapters
from isotune.models.causal import install_causal
from isotune.models.class_loss import PLAIN_LOSS
from isotune.models.classifier import install_classification
from isotune.models.opening import empty_base_model, weights_dtype
from isotune.models.packed_attention import PACKED
from isotune.preflight.request import DDP, DEEPSPEED, FSDP, PLAIN, Launch
from isotune.preflight.resources.blocks import attention_size_of, layers_of, with_layers
from isotune.training.gradients.exact_shards import BUCKET

# bitsandbytes' block sizes: an fp32 scale for 64 weights; with double quantization a byte, and fp32 for 256 scales
_WEIGHTS_PER_SCALE, _SCALES_PER_BLOCK = 64, 256
EXACT_BYTES = 8
DDP_BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb
ALIGNMENT = 2  # DeepSpeed pads each flat group to a multiple of twice the number of processes
# DeepSpeed's defaults
_PERSISTENCE_THRESHOLD, _REUSE_DISTANCE = 10**5, 10**9


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor."""

    numel: int
    rows: int  # size of the first dimension
    bytes: int  # in memory, on a process that holds it whole
    trained: bool
    decayed: bool  # whether weight decay applies
    in_block: bool  # in a transformer block, not in the layers before and after the blocks


@dataclass(frozen=True)
class ModelStats:
    """A model as it is trained, with adapters; tied tensors count once."""

    parameters: tuple[Parameter, ...]
    numel: int
    bytes: int  # on a process that holds all weights whole
    trained_numel: int
    block_numel: int  # of all blocks together
    block_bytes: int
    layers: int
    attention_size: int  # heads times elements of a head
    linear_numel: int  # weights of all linear layers except the output head
    head_numel: int  # of the output head
    adapter_numel: int  # of LoRA
    largest_block_bytes: int  # weights of the largest block, which a sharding engine gathers
    # whether the run fills the documents of a microbatch up to the longest: what the architecture offers, as only a run
    # measures it with the model's weights
    pads: bool = False


def model_builder(
    recipe: RunRecipe, config: PreTrainedConfig, num_labels: int | None = None, new_rows: Sequence[int] = ()
) -> Callable[[int | None], nn.Module]:
    """A function that builds the recipe's model, with adapters, with a number of blocks, or all, on the meta device."""

    def build(layers: int | None) -> nn.Module:
        smaller: Any = with_layers(config, layers)
        assert smaller is not None, "a type that can have fewer blocks"
        if isinstance(recipe, ClassificationRecipe):
            smaller.num_labels = num_labels or recipe.num_labels or 2
        # under ZeRO-3 transformers would shard the weights at loading, and meta tensors cannot be sharded
        with whole_models(), torch.device("meta"):
            base = empty_base_model(recipe, smaller, new_rows, weights_dtype(recipe))
            if isinstance(recipe, ClassificationRecipe):
                install_classification(base, PLAIN_LOSS)  # others take no more memory
            else:
                install_causal(base, recipe.max_seq_length)
            return base if recipe.tune == "full" else add_adapters(base, recipe, new_rows)

    return build


def model_stats(
    recipe: RunRecipe, config: PreTrainedConfig, num_labels: int | None = None, new_rows: Sequence[int] = ()
) -> ModelStats:
    """Build the recipe's model and count its parameters."""
    model, layers = model_builder(recipe, config, num_labels, new_rows)(None), layers_of(config)
    head = base_model_of(model).get_output_embeddings() if isinstance(recipe, Recipe) else None
    decayed = set(get_parameter_names(model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm"]))
    modules = model.named_modules()  # the linear layers are counted without the output head and adapters
    linear = [m.weight for name, m in modules if isinstance(m, nn.Linear) and m is not head and "lora_" not in name]
    four_bit = {id(weight) for weight in linear if recipe.tune == "qlora" and not weight.requires_grad}
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    blocks = list(lists[0]) if lists else []
    block = max((sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks), default=0)
    in_blocks = {id(p) for b in blocks for p in b.parameters()}
    parameters = []
    adapter_numel = 0
    for name, p in model.named_parameters():
        numel = p.numel()
        size = _four_bit_bytes(recipe, numel) if id(p) in four_bit else numel * p.element_size()
        parameters.append(Parameter(numel, p.shape[0], size, p.requires_grad, name in decayed, id(p) in in_blocks))
        adapter_numel += numel if "lora_" in name else 0
    of_blocks = [p for p in parameters if p.in_block]
    return ModelStats(
        parameters=tuple(parameters),
        numel=sum(p.numel for p in parameters),
        bytes=sum(p.bytes for p in parameters),
        trained_numel=sum(p.numel for p in parameters if p.trained),
        block_numel=sum(p.numel for p in of_blocks),
        block_bytes=sum(p.bytes for p in of_blocks),
        layers=layers,
        attention_size=attention_size_of(config),
        linear_numel=sum(weight.numel() for weight in linear),
        head_numel=0 if head is None else head.weight.numel(),
        adapter_numel=adapter_numel,
        largest_block_bytes=block,
        pads=attention_of(base_model_of(model).config) != PACKED,
    )


def _four_bit_bytes(recipe: RunRecipe, numel: int) -> int:
    scales = -(-numel // _WEIGHTS_PER_SCALE)
    of_scales = scales + 4 * -(-scales // _SCALES_PER_BLOCK) if recipe.bnb_4bit_use_double_quant else 4 * scales
    return -(-numel // 2) + of_scales


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
    def shards_gradients(self) -> bool:
        """Whether the engine shards the weights, so that exact gradients are shards from each microbatch on."""
        return self.launch.engine == FSDP or self.launch.zero_stage == 3

    @property
    def exact_bucket_numel(self) -> int:
        """The most elements of exact gradients that are whole at once where they are sharded."""
        model = self.model
        most = max(model.block_numel // max(model.layers, 1), model.numel - model.block_numel)  # FSDP2's groups
        if self.launch.zero_stage == 3:
            most = BUCKET + max(p.numel for p in model.parameters)
        return min(most, model.trained_numel)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient's element, in the type of the trained weights.

        DeepSpeed casts these to 16 bits, except adapters under ZeRO-3, whose base weights are sharded before.
        """
        is_cast = self.launch.casts_weights(self.recipe)
        return 2 if is_cast and not (self.launch.zero_stage == 3 and self.recipe.tune != "full") else 4

    @property
    def reduced_bytes(self) -> int:
        """Bytes of a gradient's element between processes."""
        return self._sum_bytes((self.launch.deepspeed_config or {}).get("communication_data_type"))

    @property
    def summed_bytes(self) -> int:
        """Bytes of a gradient's element in the sum of the microbatches of a process."""
        data_types = (self.launch.deepspeed_config or {}).get("data_types") or {}
        sums_apart = self.recipe.bf16 and (self.launch.zero_stage or 0) >= 2
        return self._sum_bytes(data_types.get("grad_accum_dtype")) if sums_apart else self.gradient_bytes

    def _sum_bytes(self, dtype: str | None) -> int:
        """Bytes of `dtype` of a DeepSpeed configuration, where without it a sum is fp32, except in fp16."""
        is_16_bit = dtype in ("bf16", "fp16") or (dtype is None and self.recipe.fp16)
        return 2 if self.launch.engine == DEEPSPEED and is_16_bit else 4

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
        exact = EXACT_BYTES * model.trained_numel if self.exact_gradients else 0
        if launch.engine == FSDP:
            is_16_bit = recipe.bf16 or recipe.fp16  # FSDP2 casts all weights that it sends to that type
            gathered = 2 * (model.numel + model.block_numel) if is_16_bit else model.bytes + model.block_bytes
            sent = exact * microbatches or self.reduced_bytes * model.trained_numel
            return {"reduce_scatter": sent, "all_gather": microbatches * gathered}
        if zero == 3:
            persistent, others = self._by_persistence
            gathered = persistent + microbatches * (others + round(others * (1 - self._kept_share)))
            sent = exact * microbatches or self.reduced_bytes * model.trained_numel * reductions
            return {"reduce_scatter": sent, "all_gather": gathered}
        sent = exact
        if not exact or zero:
            sent += self.reduced_bytes * model.trained_numel * reductions
        gathered = self.gradient_bytes * launch.world_size * self.optimized_numel
        return {"all_reduce": sent, "all_gather": gathered} if zero else {"all_reduce": sent}

    def rings(self, microbatches: int) -> int:
        """How many rings of reduce-scatters and all-gathers a step starts; an all-reduce is two.

        FSDP2 and ZeRO-3 communicate block by block, DDP and the other stages in buckets.
        """
        sent, groups = self.collectives(microbatches), self.model.layers + 1
        if self.launch.engine == FSDP:
            return groups * (2 * microbatches + (microbatches if self.exact_gradients else 1))
        if self.launch.zero_stage == 3:
            gathers = microbatches * (1 if self._kept_share == 1 else 2)
            return groups * (gathers + (microbatches if self.recipe.gradient_reduction == "pass" else 1))
        bucket = DDP_BUCKET_BYTES
        if self.launch.engine == DEEPSPEED:
            bucket = self.reduced_bytes * int(self.launch.zero_optimization.get("reduce_bucket_size", 5e8))
        return sum((2 if name == "all_reduce" else 1) * -(-size // bucket) for name, size in sent.items())

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
