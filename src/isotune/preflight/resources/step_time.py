"""The time of one step, predicted from what its slowest process computes, moves and sends.

    a microbatch    the longer of the device's time and the host's: launches x seconds of a launch
    the device      products: FLOPs / (share x peak) + bytes of their factors / bandwidth
                    attention: FLOPs / (share x peak)
                    everything else: bytes / bandwidth
    a step          its microbatches, the optimizer, and the communication that nothing hides
    communication   the start and the hops of each ring, which all processes wait for, and (1 - overlap) of its bytes;
                    of the others what takes longer than the computation

Bandwidths are shares of the data sheet's. The shares and latencies, few and each with a physical meaning, are in
time_parameters.yaml, with how they were found; docs/plan.md compares the predictions with published figures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

from isotune.preflight.request import DDP
from isotune.preflight.resources.compute import Work, count_flops
from isotune.preflight.resources.devices import Device
from isotune.preflight.resources.memory import state_bytes
from isotune.preflight.resources.sharding import Sharding
from isotune.preflight.resources.traffic import Traffic

PARAMETERS = Path(__file__).with_name("time_parameters.yaml")
# an optimizer step reads gradient and weight, writes the weight; the norm reads the gradient, clipping scales it
_OPTIMIZER_BYTES = 24
_FOUR_BIT_READ_AND_WRITTEN = 2.5  # bytes of a weight that is dequantised to 16 bits


@dataclass(frozen=True)
class StepLoad:
    """What the slowest process does in a step."""

    product_flops: float
    attention_flops: float
    traffic: Traffic  # of all its microbatches
    optimizer_bytes: float


@dataclass(frozen=True)
class Elsewhere:
    """How other code than isotune's does the same work."""

    fused: bool  # element-wise operations are compiled together
    overlaps: bool  # gradients travel during backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest process; `floor` is its products at the device's peak."""

    floor: float
    products: float
    attention: float
    elementwise: float
    launches: float  # what the host needs beyond the device's time
    optimizer: float
    communication: float  # what computation does not hide
    measured: float | None = None  # seconds of computation by a finished run's share of the peak

    @property
    def compute(self) -> float:
        """Seconds without communication."""
        if self.measured is not None:
            return self.measured
        return self.products + self.attention + self.elementwise + self.launches + self.optimizer

    @property
    def expected(self) -> float:
        """Seconds of the step."""
        return self.compute + self.communication

    @property
    def mfu(self) -> float:
        """The share of the device's peak that the step's products and attention reach."""
        return self.floor / self.expected


@cache
def load_parameters() -> Mapping[str, float]:
    """The parameters of the model, by name."""
    values = yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))
    return values["fitted"] | values["fixed"]


def step_load(sharding: Sharding, work: Work, traffic: Traffic) -> StepLoad:
    """The load of a plan's slowest process; `traffic` is that of the costliest microbatch."""
    share = (1 + work.imbalance) / sharding.launch.world_size
    counts = (work.tokens_per_step, work.targets_per_step, work.attention_squares_per_step)
    products, attention = count_flops(sharding.recipe, sharding.model, *(share * count for count in counts))
    bytes_of_traffic = share * work.tokens_per_step / max(sum(work.costliest_microbatch[0]), 1)
    moved = Traffic(
        traffic.product_bytes * bytes_of_traffic,
        traffic.elementwise_bytes * bytes_of_traffic,
        traffic.launches * work.microbatches_per_rank,
    )
    return load_of(sharding, products, attention, moved, work.microbatches_per_rank)


def load_of(sharding: Sharding, products: float, attention: float, traffic: Traffic, microbatches: int) -> StepLoad:
    """The load of FLOPs and traffic in a process's microbatches, with what 4-bit weights and the optimizer move."""
    moved = replace(traffic, elementwise_bytes=traffic.elementwise_bytes + _dequantised_bytes(sharding) * microbatches)
    return StepLoad(products, attention, moved, _optimizer_bytes(sharding))


def _dequantised_bytes(sharding: Sharding) -> float:
    """Bytes that a microbatch moves to have 4-bit weights in 16 bits: in forward, backward and where it is repeated."""
    if sharding.recipe.tune != "qlora":
        return 0.0
    passes = 3 if sharding.recipe.training_arguments.get("gradient_checkpointing") else 2
    return passes * _FOUR_BIT_READ_AND_WRITTEN * sharding.model.linear_numel


def _optimizer_bytes(sharding: Sharding) -> float:
    """Bytes that the norm, clipping and the optimizer move."""
    return (_OPTIMIZER_BYTES + 2 * state_bytes(sharding.recipe)) * sharding.optimized_numel


def predict_step(
    sharding: Sharding,
    microbatches: int,
    load: StepLoad,
    device: Device,
    per_node: int,
    *,
    parameters: Mapping[str, float] | None = None,
    as_elsewhere: Elsewhere | None = None,
) -> StepTime:
    """The time of a step with so many microbatches on a process and `per_node` processes on a node.

    `parameters` are those of the file, and the code isotune's, unless something else is given.
    """
    p = load_parameters() if parameters is None else parameters
    # DDP reduces after the vote that follows the last backward, and integers of exact gradients travel at the end
    code = as_elsewhere or Elsewhere(fused=False, overlaps=sharding.launch.engine != DDP)
    peak = device.peak_flops(sharding.recipe)
    memory = p["memory"] * device.memory_bytes_per_second
    alone = sharding.launch.world_size == 1
    waiting, overlap = 1.0 if alone else p["slowest"], p["overlap"] if code.overlaps else 0.0
    products = waiting * load.product_flops / (p[f"products_{device.family}"] * peak)
    products += waiting * load.traffic.product_bytes / memory
    attention = waiting * load.attention_flops / (p[f"attention_{device.family}"] * peak)
    moved = p["elementwise_fused" if code.fused else "elementwise_eager"] * load.traffic.elementwise_bytes
    elementwise = waiting * moved / memory
    on_device = products + attention + elementwise
    return StepTime(
        floor=(load.product_flops + load.attention_flops) / peak,
        products=products,
        attention=attention,
        elementwise=elementwise,
        launches=max(0.0, p["launch"] * load.traffic.launches - on_device),
        optimizer=load.optimizer_bytes / memory,
        communication=0.0 if alone else _exposed(sharding, microbatches, on_device, device, per_node, p, overlap),
    )


def _exposed(
    sharding: Sharding,
    microbatches: int,
    compute: float,
    device: Device,
    per_node: int,
    p: Mapping[str, float],
    overlap: float,
) -> float:
    """Seconds of communication that computation does not hide.

    A ring enters and leaves a node once, and large collectives run a ring over each network card, so the network of
    all processes of a node carries them; it is not faster than the links within the node.
    """
    count = sharding.launch.world_size
    on_node = min(count, per_node)
    nodes = math.ceil(count / per_node)
    link = device.link_bytes_per_second
    if nodes > 1:
        link = min(link, on_node * device.network_bytes_per_second)
    hop = p["hop_nvlink"] if device.has_nvlink else p["hop_pcie"]
    ring = p["collective"] + (nodes - 1) * p["hop_network"] + (count - nodes) * hop
    travel = sharding.bytes_sent(microbatches) / (p["links"] * link)
    return sharding.rings(microbatches) * ring + (1 - overlap) * travel + max(0.0, overlap * travel - compute)
