"""LoRA matrices that begin as a part of the base's weights (PiSSA, OLoRA), and the plain adapter of what they learn.

Such a start takes the product of the first matrices out of the base, W' = W - s B0 A0, and trains A and B over W'. On W
these are of no use, so what is saved is a plain LoRA adapter of twice the rank over the base as it is published,
s [B, -B0] [A; A0] = (W' + s B A) - W. Whatever reads adapters reads it, and merging it gives the trained weights.

The start depends on the weights alone: it is computed on the CPU, in one thread and with a seed of the layer's own, so
that its bits are the same in every launch. A run that goes on computes it again and takes A and B from its checkpoint.
"""

import copy
import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isotune.compat.torch import one_thread
from isotune.io.errors import VALUES, UserError
from isotune.models.cpu.layers import is_whole

Factors = dict[str, tuple[Tensor, Tensor, float]]  # by layer: its first A and B on the CPU, and its scale

# of each model whose base was changed
_factors: weakref.WeakKeyDictionary[nn.Module, Factors] = weakref.WeakKeyDictionary()


def starts_from_base(start: Any) -> bool:
    """Whether a value of init_lora_weights changes the base's weights."""
    return isinstance(start, str) and start.startswith(("pissa", "olora"))


def first_factors(model: nn.Module) -> Factors:
    """The matrices that were taken out of a model's base; none where nothing was."""
    return _factors.get(model, {})


@torch.no_grad()
def start_from_base(model: Any, start: str, seed: int) -> None:
    """Set the LoRA matrices of a PeftModel that was just made, and take their product out of its base.

    UserError where weights are in shards or in 4 bits, or a layer has a smaller side than the rank.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # an estimate, which reads no values
    found: Factors = {}
    for name, module in layers.items():
        layer: Any = module
        base, adapter = layer.get_base_layer(), next(iter(layer.lora_A))
        if not base.weight.is_floating_point() or type(base).__module__.startswith("bitsandbytes."):
            raise UserError(
                f"init_lora_weights: {start} changes the base, and rounding it to 4 bits again would change it more: "
                "say tune: lora, or init_lora_weights: true",
                reason=VALUES,
            )
        if not is_whole(base.weight):
            raise UserError(
                f"init_lora_weights: {start} reads whole weights, which ZeRO-3 keeps in shards: use ZeRO-2",
                reason=VALUES,
            )
        if start == "olora" and isinstance(base, Conv1D):
            raise UserError(
                "init_lora_weights: olora has no form for Conv1D layers, such as GPT-2's: say pissa", reason=VALUES
            )
        if layer.r[adapter] > min(base.weight.shape):
            short = f"{name.removeprefix('base_model.model.')} has a side of {min(base.weight.shape)}"
            says = f"init_lora_weights: {start} has no rank of {layer.r[adapter]} where {short}: lower r"
            raise UserError(says, reason=VALUES)
        device = base.weight.device
        layer.to("cpu")
        with one_thread():
            torch.manual_seed(_seed_of(seed, name))  # of the fast forms, which begin at random
            if start == "olora":
                layer.olora_init(adapter)
            else:
                layer.pissa_init(adapter, start)
        base.weight.data = base.weight.data.contiguous()
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        down.data, up.data = down.data.contiguous(), up.data.contiguous()
        found[name] = down.data.clone(), up.data.clone(), float(layer.scaling[adapter])
        layer.to(device)
    _factors[model] = found


def as_plain_adapter(trained: Mapping[str, Tensor], settings: Any, factors: Factors) -> tuple[dict[str, Tensor], Any]:
    """The tensors and peft's settings of the adapter that gives the same weights over the base as it was.

    `trained` are tensors on the CPU by the names of the model's parameters. The scale is part of the new matrices.
    """
    tensors, plain = dict(trained), copy.deepcopy(settings)
    for name, (down, up, scale) in factors.items():
        a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        tensors[a] = torch.cat([trained[a].float(), down.float()])
        tensors[b] = torch.cat([trained[b].float(), -up.float()], dim=1) * scale
    plain.init_lora_weights, plain.use_rslora = True, False
    plain.r = plain.lora_alpha = 2 * settings.r
    plain.rank_pattern = {name: 2 * rank for name, rank in (settings.rank_pattern or {}).items()}
    plain.alpha_pattern = dict(plain.rank_pattern)
    return tensors, plain


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
