"""A plain model out of a sharded one, so that it can be saved, reopened and compared like any other.

Under ZeRO-3 and FSDP2 no rank holds the whole weights, and in 16-bit DeepSpeed the model has rounded copies of the fp32
parameters that are trained. One parameter after the other is gathered on every rank and kept in host memory of the
main rank only.
"""

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from isotune.compat import deepspeed
from isotune.compat.transformers import set_attention_of


def plain_model(model: nn.Module, *, keep: bool) -> nn.Module | None:
    """`model`, out of its engine's wrapper, where it is whole on this rank, else a plain copy of it in host memory.

    The copy of a `PeftModel` has memory for its trained tensors only. Collective: every rank must call it, and those
    that do not `keep` the result get None.
    """
    reshard(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(
        isinstance(p, DTensor) or deepspeed.is_partitioned(p) or deepspeed.has_fp32_copy(p) for p in trained.values()
    ):
        return model if keep else None
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained.items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else deepspeed.gather_fp32(parameter)
        if keep:
            tensors[name] = whole.detach().to("cpu", copy=True)
        del whole
    return _copy_with(model, tensors) if keep else None


def reshard(model: nn.Module) -> None:
    """Shard the outermost weights again, which FSDP2 leaves whole after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _copy_with(model: Any, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A model of the same class and configuration with `tensors`; parameters that they do not name stay on meta."""
    adapter = hasattr(model, "peft_config")
    base = model.get_base_model() if adapter else model
    config = copy.deepcopy(base.config)
    set_attention_of(config, "eager")
    # the model's own class: FSDP2 replaces it by a class derived from it
    plain_class: Any = next(cls for cls in type(base).__mro__ if not cls.__name__.startswith("FSDP"))
    with torch.device("meta"):
        fresh = plain_class(config)
    if hasattr(base, "generation_config"):  # a classifier has none
        fresh.generation_config = base.generation_config
    if adapter:
        from peft import get_peft_model

        with torch.device("meta"):
            settings = copy.deepcopy(model.peft_config["default"])
            fresh = cast(Any, get_peft_model)(fresh, settings, low_cpu_mem_usage=True)
        settings.base_model_name_or_path = model.peft_config["default"].base_model_name_or_path
    unknown = fresh.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    assert not unknown, f"{unknown[0]} has no place in a plain {type(fresh).__name__}"
    if not adapter:
        fresh.tie_weights()
        for name, buffer in base.named_buffers():
            if name in fresh.state_dict():
                module, _, leaf = name.rpartition(".")
                setattr(fresh.get_submodule(module), leaf, buffer.detach().cpu())
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(name in tensors)
    return fresh
