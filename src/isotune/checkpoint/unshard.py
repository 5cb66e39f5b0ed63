"""A model in shares becomes a plain one, so that it can be saved, reopened and compared like any other.

Under ZeRO-3 and FSDP2 no rank holds the weights, and under 16-bit DeepSpeed the engine trains fp32 numbers of which
the model has rounded copies. One parameter after the other is put together on every rank and kept in the main rank's
host memory only.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def plain_model(model: nn.Module, *, keep: bool) -> nn.Module | None:
    """`model` itself where it is whole on this rank, else a plain copy of what was trained, in host memory.

    Every rank must call it.

    Args:
        model: without its engine's wrapping.
        keep: whether this rank gets the result.

    Returns:
        A `PreTrainedModel` or `PeftModel` for `save_and_verify`: of an adapter's copy only the trained tensors exist.
        None where `keep` is False.
    """
    reshard(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(_in_shares(p) or _has_master(p) for p in trained.values()):
        return model if keep else None
    tensors = {}
    for name, parameter in trained.items():
        whole = _whole(parameter)
        if keep:
            tensors[name] = whole.detach().to("cpu", copy=True)
        del whole
    return _copy_with(model, tensors) if keep else None


def reshard(model: nn.Module) -> None:
    """FSDP2 leaves the outermost weights whole after a forward pass that no backward pass follows: share them again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _in_shares(parameter: Any) -> bool:
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "full_tensor")


def _has_master(parameter: Any) -> bool:
    """Whether DeepSpeed trains fp32 numbers behind a 16-bit parameter."""
    return parameter.dtype != torch.float32 and hasattr(parameter, "_hp_mapping")


def _whole(parameter: Any) -> torch.Tensor:
    """All numbers of a parameter, on every rank."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_tensor"):
        return parameter._z3_optimizer.get_full_hp_param(parameter)
    return parameter.get_full_hp_param() if _has_master(parameter) else parameter


def _copy_with(model: Any, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A model of the same class and configuration that holds `tensors`; what they do not name stays without memory."""
    adapter = hasattr(model, "peft_config")
    base = model.get_base_model() if adapter else model
    config = copy.deepcopy(base.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        fresh: Any = _plain_class(base)(config)
    if hasattr(base, "generation_config"):  # a classifier generates nothing
        fresh.generation_config = base.generation_config
    if adapter:
        from peft import get_peft_model

        with torch.device("meta"):
            settings = copy.deepcopy(model.peft_config["default"])
            fresh = get_peft_model(fresh, settings, low_cpu_mem_usage=True)
        settings.base_model_name_or_path = model.peft_config["default"].base_model_name_or_path
    unknown = fresh.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    assert not unknown, f"{unknown[0]} has no place in a plain {type(fresh).__name__}"
    if not adapter:
        fresh.tie_weights()
        for name, buffer in base.named_buffers():
            if name in fresh.state_dict():
                owner, _, leaf = name.rpartition(".")
                fresh.get_submodule(owner)._buffers[leaf] = buffer.detach().cpu()
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(name in tensors)
    return fresh


def _plain_class(base: nn.Module) -> type:
    """FSDP2 trains an instance of a class that it made beside the model's own."""
    return next(cls for cls in type(base).__mro__ if not cls.__name__.startswith("FSDP"))
