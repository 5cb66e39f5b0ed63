"""The time of a step, from its FLOPs, the device's peak and the bytes that the processes send.

FLOPs are counted as they are computed: attention within documents, half of it where it is causal, the head at
supervised positions only, and a second forward with gradient checkpointing. The floor is FLOPs over the data sheet's
peak. A run reaches a share of the peak, the model FLOPs utilization (MFU): `--measured RUN` takes it from a finished
run, otherwise it is assumed to be `DEFAULT_MFU`, and the report says so.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from isotune.config import Recipe, RunRecipe
from isotune.io.errors import UserError
from isotune.preflight.launches import Launch
from isotune.preflight.resources.communication import bytes_sent
from isotune.preflight.resources.model_stats import ModelStats
from isotune.preflight.resources.work import Work
from isotune.run.metrics_file import METRICS, read_metrics

DEFAULT_MFU = 0.4


@dataclass(frozen=True)
class Device:
    """The data sheet of a device: dense peak FLOPs a second, memory, and link speed within and between nodes."""

    name: str
    flops_16_bit: float
    flops_32_bit: float
    memory_bytes: int
    link_bytes_per_second: float
    network_bytes_per_second: float = 25e9

    def peak_flops(self, recipe: RunRecipe) -> float:
        """The peak in the recipe's precision."""
        return self.flops_16_bit if recipe.bf16 or recipe.fp16 else self.flops_32_bit


_GB = 10**9
DEVICES = {
    device.name: device
    for device in (
        Device("H200", 989e12, 67e12, 141 * _GB, 450e9, 50e9),
        Device("H100", 989e12, 67e12, 80 * _GB, 450e9, 50e9),
        Device("A100-80", 312e12, 19.5e12, 80 * _GB, 300e9),
        Device("A100-40", 312e12, 19.5e12, 40 * _GB, 300e9),
        Device("L40S", 362e12, 91.6e12, 48 * _GB, 32e9),
        Device("L4", 121e12, 30.3e12, 24 * _GB, 32e9),
        Device("A10", 125e12, 31.2e12, 24 * _GB, 32e9),
        Device("V100", 125e12, 15.7e12, 32 * _GB, 150e9),
        Device("T4", 65e12, 8.1e12, 16 * _GB, 16e9),
        Device("RTX4090", 165e12, 82.6e12, 24 * _GB, 32e9),
        Device("RTX3090", 71e12, 35.6e12, 24 * _GB, 32e9),
    )
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest process.

    Attributes:
        floor: computation at the device's peak.
        compute: expected computation.
        communication: at the links' speed, without overlap.
    """

    floor: float
    compute: float
    communication: float

    @property
    def expected(self) -> float:
        """Computation plus communication: an upper bound if they overlap."""
        return self.compute + self.communication


def find_device(name: str) -> Device:
    """Find a device by its name.

    Raises:
        UserError: it is not in the table.
    """
    for device in DEVICES.values():
        if device.name.lower() == name.lower():
            return device
    raise UserError(f"--device {name} is not known: choose among {', '.join(DEVICES)}, or say --measured RUN")


def flops_per_step(recipe: RunRecipe, model: ModelStats, work: Work) -> float:
    """FLOPs of the matrix products of a step, over all processes."""
    causal = isinstance(recipe, Recipe)
    trains_weights = recipe.tune == "full"
    # 2 for forward, 2 for the gradient of the input, 2 for the gradient of a trained weight
    times = 6 if trains_weights else 4
    again = 2 if recipe.training_arguments.get("gradient_checkpointing") else 0
    linear = (times + again) * model.linear_numel * work.tokens_per_step
    head = times * model.head_numel * work.targets_per_step
    adapters = (6 + again) * model.adapter_numel * work.tokens_per_step
    square = (2 if causal else 4) * work.attention_squares_per_step * model.hidden_size * model.layers
    return linear + head + adapters + square * (3 + again / 2)


def step_time(
    recipe: RunRecipe,
    model: ModelStats,
    launch: Launch,
    work: Work,
    device: Device,
    mfu: float,
    processes_per_node: int,
) -> StepTime:
    """The time of one step.

    Args:
        mfu: the share of the device's peak that a real step reaches.
        processes_per_node: with more processes the network between the nodes is the link.
    """
    all_flops = flops_per_step(recipe, model, work)
    # ranks share whole microbatches, and the rank with most of them is the slowest
    rank_flops = all_flops * work.microbatches_per_rank / work.microbatches_per_step
    floor = max(rank_flops, all_flops / launch.world_size * (1 + work.imbalance)) / device.peak_flops(recipe)
    link = device.link_bytes_per_second if launch.world_size <= processes_per_node else device.network_bytes_per_second
    return StepTime(floor, floor / mfu, bytes_sent(recipe, model, launch, work.microbatches_per_rank) / link)


def measured_mfu(run: Path, recipe: RunRecipe, model: ModelStats, work: Work, device: Device) -> float:
    """The MFU of a finished run of this recipe: the median over its steps, on one process.

    Raises:
        UserError: the folder has no steps.
    """
    try:
        steps = read_metrics(run / METRICS).steps.values()
        processes = int(json.loads((run / "environment.json").read_text(encoding="utf-8"))["in_effect"]["world_size"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--measured {run}: no metrics.jsonl and environment.json of a run: {error}") from None
    rates = [line["tokens_per_second"] for line in steps if line.get("tokens_per_second")]
    if not rates:
        raise UserError(f"--measured {run}: metrics.jsonl has no step")
    flops_per_token = flops_per_step(recipe, model, work) / work.tokens_per_step
    return statistics.median(rates) / processes * flops_per_token / device.peak_flops(recipe)
