"""Where gradients can be summed as integers: engines, precisions, optimizers and devices that keep it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isotune.distributed.deepspeed_config import stage_of
from isotune.io.errors import VALUES, UserError

# torch 2.13's fused AdamW rounds the last few numbers of a tensor otherwise on CPU (44 of 14,000 in ten steps, on
# tensors of 7), 8-bit optimizers quantize blocks, Adafactor factors matrices: to them a shard is another tensor.
POSITION_FREE_OPTIMIZERS = ("adamw_torch", "sgd")


@dataclass(frozen=True)
class UpdateSetting:
    """What the bits of an update depend on beside the gradients."""

    device: str  # its type, as torch names it
    optimizer: str  # by its name in TrainingArguments
    precision: str = "no"  # of matrix products: no (fp32), bf16 or fp16
    fsdp: bool = False
    deepspeed_config: Mapping[str, Any] | None = None  # None under other engines

    @property
    def shards(self) -> bool:
        """Whether the engine shards what it updates, or could."""
        return self.fsdp or self.deepspeed_config is not None

    @property
    def holds_integers(self) -> bool:
        """Whether the device has the numbers that integers are made with: MPS has no float64."""
        return self.device != "mps"


def check_exact(setting: UpdateSetting) -> None:
    """UserError where exact gradients are asked for and the engine, precision, optimizer or device cannot keep them."""
    if not setting.holds_integers:
        raise UserError("exact_gradients: true cannot hold on MPS, which has no float64: say device: cpu")
    if not setting.shards:
        return
    stage = None if setting.deepspeed_config is None else stage_of(setting.deepspeed_config)
    engine = "FSDP" if stage is None else f"ZeRO-{stage}"
    if stage == 0:
        raise UserError(
            "exact_gradients: true cannot hold under ZeRO-0: use DDP, FSDP2, ZeRO-1, ZeRO-2 or ZeRO-3", reason=VALUES
        )
    if setting.precision == "bf16" and stage in (1, 2):
        raise UserError(
            f"exact_gradients: true cannot hold under {engine} in bf16, which rounds gradients itself: use DDP, "
            "FSDP2 or ZeRO-3",
            reason=VALUES,
        )
    if setting.precision == "fp16":
        raise UserError(
            f"exact_gradients: true cannot hold under {engine} in fp16: use DDP, or bf16: true", reason=VALUES
        )
    zero = (setting.deepspeed_config or {}).get("zero_optimization") or {}
    for key, why in _unexact_zero3_keys(zero) if stage == 3 else ():
        raise UserError(f"exact_gradients: true cannot hold with zero_optimization.{key}, {why}: take it out")
    if setting.optimizer not in POSITION_FREE_OPTIMIZERS:
        raise UserError(
            f"exact_gradients: true under {engine} needs optim: {' or '.join(POSITION_FREE_OPTIMIZERS)}, because "
            f"{setting.optimizer} rounds a number by where it lies in a share: say so on every number of processes",
            reason=VALUES,
        )


def _unexact_zero3_keys(zero: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of ZeRO-3's section that would change what is added up, and why."""
    if zero.get("zero_quantized_gradients"):
        yield "zero_quantized_gradients", "which rounds what travels"
    if zero.get("mics_shard_size", -1) > 0:
        yield "mics_shard_size", "whose shares are of a part of the processes"
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        yield "offload_optimizer.device: nvme", "which would be read and written once for each parameter"
