"""How long a step must take at least: its floating-point operations, a device's peak, and what processes must send.

A step's products are counted as they are: attention within documents, half a square where it is causal, the head at
supervised positions only, and once more forward with gradient checkpointing. The floor is these over the peak of the
data sheet. What a run really reaches is a share of it, which `--measured RUN` takes from a finished run; without one
`USUAL_SHARE` is assumed, and the plan says so.
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

USUAL_SHARE = 0.4


@dataclass(frozen=True)
class Device:
    """Dense peak of a data sheet in 16 and 32 bits, memory, and the speed of links, within a node and between nodes."""

    name: str
    flops_16_bit: float
    flops_32_bit: float
    memory_bytes: int
    link_bytes_per_second: float
    network_bytes_per_second: float = 25e9


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
        floor: products at the device's peak, nothing else.
        compute: expected.
        communication: what must be sent, at the links' speed, as if nothing overlapped.
    """

    floor: float
    compute: float
    communication: float

    @property
    def expected(self) -> float:
        """Compute and communication one after the other: an upper bound where they overlap."""
        return self.compute + self.communication


def find_device(name: str) -> Device:
    """A device of the table.

    Raises:
        UserError: it is not there.
    """
    for device in DEVICES.values():
        if device.name.lower() == name.lower():
            return device
    raise UserError(f"--device {name} is not known: choose among {', '.join(DEVICES)}, or say --measured RUN")


def flops_per_step(recipe: RunRecipe, model: ModelStats, work: Work) -> float:
    """Floating-point operations of the products of one step, over all processes."""
    causal = isinstance(recipe, Recipe)
    trains_weights = recipe.tune == "full"
    # forward and the gradient of the input; the gradient of the weight where it is trained
    times = 6 if trains_weights else 4
    again = 2 if recipe.training_arguments.get("gradient_checkpointing") else 0
    linear = (times + again) * model.linear_numbers * work.tokens_per_step
    head = times * model.head_numbers * work.targets_per_step
    adapters = (6 + again) * model.adapter_numbers * work.tokens_per_step
    square = (2 if causal else 4) * work.attention_squares_per_step * model.hidden_size * model.layers
    return linear + head + adapters + square * (3 + again / 2)


def step_time(
    recipe: RunRecipe, model: ModelStats, launch: Launch, work: Work, device: Device, share: float, per_node: int
) -> StepTime:
    """The time of one step.

    Args:
        device: its peak and links.
        share: of the peak that products reach in a real step.
        per_node: processes of a node; beyond it the network is the link.
    """
    sixteen = recipe.bf16 or recipe.fp16
    peak = device.flops_16_bit if sixteen else device.flops_32_bit
    all_flops = flops_per_step(recipe, model, work)
    # ranks share whole passes: the slowest has the most of them
    own = all_flops * work.passes_per_rank / work.passes_per_step
    own = max(own, all_flops / launch.world_size * (1 + work.imbalance))
    link = device.link_bytes_per_second if launch.world_size <= per_node else device.network_bytes_per_second
    return StepTime(own / peak, own / peak / share, bytes_sent(recipe, model, launch, work.passes_per_rank) / link)


def measured_share(run: Path, recipe: RunRecipe, model: ModelStats, work: Work, device: Device) -> float:
    """The share of the peak that a finished run of this recipe reached on one process: median of its steps.

    Raises:
        UserError: the folder holds no steps.
    """
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        processes = int(json.loads((run / "environment.json").read_text(encoding="utf-8"))["in_effect"]["world_size"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--measured {run}: no metrics.jsonl and environment.json of a run: {error}") from None
    rates = [line["tokens_per_second"] for line in lines if "loss" in line and line.get("tokens_per_second")]
    if not rates:
        raise UserError(f"--measured {run}: metrics.jsonl has no step")
    peak = device.flops_16_bit if recipe.bf16 or recipe.fp16 else device.flops_32_bit
    return statistics.median(rates) / processes * flops_per_step(recipe, model, work) / work.tokens_per_step / peak
