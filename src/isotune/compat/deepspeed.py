"""DeepSpeed 0.19: where its ZeRO optimizers keep the training state, and how transformers 5.23 loads under ZeRO-3.

DeepSpeed's own checkpoints are pickles that only the same number of ranks can read, so isotune reads and writes the
fp32 parameters and optimizer states of its optimizers directly. None of this has a public accessor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def whole_models() -> Iterator[None]:
    """Within it a model is created whole under ZeRO-3 too; DeepSpeed partitions it in `prepare`.

    transformers would draw random weights by partition, each from its own random numbers, and cannot place 4-bit ones.
    """
    from transformers.integrations import deepspeed as integration

    announced = integration._hf_deepspeed_config_weak_ref
    load_whole_models()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = announced


def load_whole_models() -> None:
    """From here on every rank loads models whole: transformers forgets that ZeRO-3 was configured."""
    from transformers.integrations import deepspeed as integration

    integration.unset_hf_deepspeed_config()


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 partitions the parameter, gathered at the moment or not."""
    return hasattr(parameter, "ds_tensor")


@contextmanager
def gathered_by_block(model: torch.nn.Module) -> Iterator[None]:
    """Within it a model that was loaded in shares runs before DeepSpeed takes it over; every rank does the same.

    A block is gathered while it runs, all else at once.
    """
    parameters = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
    if not parameters:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    inner = {id(child) for module in lists for block in module for child in block.modules()}
    blocks = [block for module in lists if id(module) not in inner for block in module]
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    running = list[Any]()

    def gather(block: Any, *_: Any) -> None:
        running.append(GatheredParameters([p for p in block.parameters() if is_partitioned(p)]))
        running[-1].__enter__()

    def release(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [block.register_forward_pre_hook(gather) for block in blocks]
    hooks += [block.register_forward_hook(release, always_call=True) for block in blocks]
    try:
        with GatheredParameters([p for p in parameters if id(p) not in in_blocks]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def gather_with(module: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> None:
    """Let ZeRO-3 gather `parameters` of other modules too wherever `module` runs, forward and backward."""
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for parameter in parameters:
        register_external_parameter(module, parameter)


def is_gathered_with(module: torch.nn.Module, parameter: Any) -> bool:
    """Whether `gather_with` was told so; DeepSpeed keeps no public list."""
    return id(parameter) in getattr(module, "_external_params", ())


def has_fp32_copy(parameter: Any) -> bool:
    """Whether DeepSpeed trains an fp32 copy of a 16-bit parameter."""
    return parameter.dtype != torch.float32 and hasattr(parameter, "_hp_mapping")


def gather_fp32(parameter: Any) -> torch.Tensor:
    """The whole parameter as it is trained, or frozen as it is, on every rank; collective."""
    if is_partitioned(parameter) and not parameter.requires_grad:  # of which the optimizer has nothing
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    if is_partitioned(parameter):
        return parameter._z3_optimizer.get_full_hp_param(parameter)
    return parameter.get_full_hp_param() if has_fp32_copy(parameter) else parameter


@dataclass(frozen=True)
class Slice:
    """This rank's contiguous part of a parameter, and where it is in the flat tensor of its group."""

    flat_start: int  # first element in the flat tensor
    start: int  # first element in the flattened parameter
    length: int  # elements; may be 0


def zero12_slice(parameter: Any) -> Slice:
    """The fragment of a parameter that this rank owns under ZeRO-1 and 2."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return Slice(0, 0, 0)
    address = mapping.get_hp_fragment_address()
    return Slice(address.start, mapping.lp_fragment_address.start, address.numel)


def zero12_after_load(zero: Any) -> None:
    """Round the fp32 parameters to the model's, gather these, and drop links to optimizer states that were replaced."""
    zero.update_lp_params()
    zero._hp_optimizer_states_linked = False


def zero3_slice(zero: Any, parameter: Any) -> Slice:
    """The partition of a parameter that this rank owns under ZeRO-3; all are of one length, the last ones padded."""
    _, flat_start, padded = zero.grad_position[zero.get_param_id(parameter)]
    start = min(dist.get_rank(group=zero._get_param_partition_group(parameter)) * padded, parameter.ds_numel)
    return Slice(flat_start, start, min(padded, parameter.ds_numel - start))


def zero3_padded_share(parameter: Any) -> int:
    """Elements of a rank's partition of a parameter under ZeRO-3: the same on every rank, the last ones padded."""
    return parameter.ds_tensor.numel()


def set_zero3_gradient(parameter: Any, share: torch.Tensor) -> None:
    """Make `share`, fp32 [padded share], this rank's gradient in the engine's next step, unless that reduces again.

    DeepSpeed's own function for it; here beside what else is done to its optimizers, and imported late as they are.
    """
    from deepspeed.utils import safe_set_local_grad

    safe_set_local_grad(parameter, share)


def zero3_after_load(zero: Any) -> None:
    """Round the fp32 partitions to the model's, and gather the parameters that every rank keeps whole."""
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def offloads_to_nvme(zero: Any) -> bool:
    """Whether ZeRO-3 keeps any part of the optimizer on NVMe."""
    return any(zero._swappable_optimizer_subgroup(group) for group in range(len(zero.fp16_groups)))


@contextmanager
def unrounded_masters(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it DeepSpeed takes over a model that computes in `dtype`, of 16 bits, and trains its weights as they were.

    0.19.8 makes the fp32 weights that it trains from those that it has rounded to 16 bits. What rounding changes is
    kept meanwhile in host memory: whole, or this rank's share of weights that were loaded in shares.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    in_shares, kept = {p for p in model.parameters() if is_partitioned(p)}, dict[Any, torch.Tensor]()
    whole_or_shared: Any = model.parameters()
    for parameter in whole_or_shared:
        held = parameter.ds_tensor if parameter in in_shares else parameter
        rounded = held.data.to(dtype)
        if parameter.requires_grad and held.dtype == torch.float32 and not torch.equal(rounded.float(), held):
            kept[parameter] = held.detach().to("cpu", copy=True).flatten()
        if parameter in in_shares and held.is_floating_point():  # DeepSpeed rounds the others itself
            held.data, parameter.data = rounded, parameter.data.to(dtype)
    yield
    for parameter, value in kept.items():
        if not is_partitioned(parameter):
            safe_set_full_fp32_param(parameter, value)
            continue
        size: int = parameter.ds_tensor.numel()
        own = value if parameter in in_shares else value[dist.get_rank() * size :][:size]
        safe_set_local_fp32_param(parameter, torch.nn.functional.pad(own, (0, size - own.numel())))


def add_up_in_fp32(model: Any) -> None:
    """Let microbatches within `coalesce_grad_reduction` add up in the configured `grad_accum_dtype` under ZeRO-2 and 3.

    0.19.8 does so only where it reduces after each microbatch, and here adds up in the parameters' own 16 bits.
    """
    dtype = model.optimizer.gradient_accumulation_dtype
    model.optimizer._gradient_reduction_buffer_dtype = lambda: dtype  # of ZeRO-2: what it copies gradients to
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = dtype


def accumulation_dtypes(model: Any, *, coalesces: bool) -> set[torch.dtype]:
    """The types that gradients of microbatches add up in: on this rank, and in its share of the reduced ones."""
    zero, own = model.optimizer, {p.grad_dtype for p in model.parameters() if p.requires_grad}
    if hasattr(zero, "grad_acc_dtype"):  # ZeRO-1 in bf16
        return {zero.grad_acc_dtype}
    if not hasattr(zero, "gradient_accumulation_dtype"):  # no ZeRO
        return own
    # ZeRO-1 keeps sums of its own, where they are of another type; ZeRO-2 and 3 only add up what is reduced
    adds_up_gradients = coalesces or not getattr(zero, "partition_gradients", True)
    shares = {zero.gradient_accumulation_dtype}
    return shares | own if adds_up_gradients and not getattr(zero, "use_grad_accum_attribute", False) else shares


def disable_shm_transport() -> None:
    """Let gloo carry collectives between CPU processes, instead of a transport that DeepSpeed compiles itself.

    DeepSpeed builds it at its first start, which needs a compiler. A process that is killed during the build leaves a
    lock behind (torch's FileBaton), and every later start of this user waits for that lock forever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]  (set at import)


def forget_coalesced_reduction(model: Any) -> None:
    """Let an exception leave `coalesce_grad_reduction`: 0.19.8 reduces there too, and waits for the other ranks."""
    model._flush_coalesced_reduction_zero12 = model._flush_coalesced_reduction_zero3 = lambda optimizer: None
