"""The peaks of devices and links, in one table: what a data sheet promises, of which a run reaches a share.

FLOPs are dense (without sparsity) and accumulate in fp32. Sources: NVIDIA's data sheets of H200, H100 SXM, A100 SXM,
L40S, L4, A10, V100 SXM2 and T4; the appendices of NVIDIA's GA102 white paper (RTX 3090, RTX A6000) and Ada white papers
(RTX 4090, RTX 6000 Ada). Links are one direction of NVLink, or of PCIe where a card has no NVLink. The network is a
GPU's share of what cloud nodes of eight such cards have: 8 x 400 Gb/s beside Hopper, 8 x 200 Gb/s beside older cards.
"""

from dataclasses import dataclass

from isotune.config import RunRecipe
from isotune.io.errors import UserError

_GB = 10**9


@dataclass(frozen=True)
class Device:
    """One kind of GPU: FLOPs a second, bytes, and bytes a second of its memory, its link and its share of a network."""

    name: str
    family: str  # devices whose products reach about the same share of the peak
    flops_16_bit: float
    flops_32_bit: float
    memory_bytes: int
    memory_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float = 25e9
    has_nvlink: bool = True

    def peak_flops(self, recipe: RunRecipe) -> float:
        """The peak in the recipe's precision."""
        return self.flops_16_bit if recipe.bf16 or recipe.fp16 else self.flops_32_bit


def _pcie(name: str, family: str, flops_16_bit: float, flops_32_bit: float, gigabytes: int, memory: float) -> Device:
    return Device(name, family, flops_16_bit, flops_32_bit, gigabytes * _GB, memory, 32e9, has_nvlink=False)


DEVICES = (
    Device("H200", "H200", 989e12, 67e12, 141 * _GB, 4.8e12, 450e9, 50e9),
    Device("H100", "H100", 989e12, 67e12, 80 * _GB, 3.35e12, 450e9, 50e9),
    Device("A100-80", "A100", 312e12, 19.5e12, 80 * _GB, 2.04e12, 300e9),
    Device("A100-40", "A100", 312e12, 19.5e12, 40 * _GB, 1.56e12, 300e9),
    Device("V100", "A100", 125e12, 15.7e12, 32 * _GB, 0.9e12, 150e9),
    _pcie("L40S", "A100", 362e12, 91.6e12, 48, 0.864e12),
    _pcie("L4", "A100", 121e12, 30.3e12, 24, 0.3e12),
    _pcie("A10", "A100", 125e12, 31.2e12, 24, 0.6e12),
    _pcie("A6000", "A100", 155e12, 38.7e12, 48, 0.768e12),
    _pcie("RTX6000Ada", "A100", 364e12, 91.1e12, 48, 0.96e12),
    _pcie("RTX4090", "A100", 165e12, 82.6e12, 24, 1.008e12),
    _pcie("RTX3090", "A100", 71e12, 35.6e12, 24, 0.936e12),
    Device("T4", "A100", 65e12, 8.1e12, 16 * _GB, 0.32e12, 16e9, has_nvlink=False),
)


def find_device(name: str) -> Device:
    """The device of a name, in any case of its letters; UserError if it is not in the table."""
    devices = {device.name.lower(): device for device in DEVICES}
    if name.lower() not in devices:
        names = ", ".join(device.name for device in DEVICES)
        raise UserError(f"--device {name} is not known: choose among {names}")
    return devices[name.lower()]
