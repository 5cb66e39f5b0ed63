"""torch 2.13: patches, and what operators, autograd, FSDP2, DTensor and tensor subclasses have no public name for."""

import contextlib
import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# ReduceScatter is what the public `FSDPModule.set_custom_reduce_scatter` takes, DefaultReduceScatter what undoes it; no
# public module exports them.
__all__ = ["DefaultReduceScatter", "FakeTensorMode", "ReduceScatter", "TorchDispatchMode", "tree_iter"]

if TYPE_CHECKING:

    class AutogradFunction:
        """`torch.autograd.Function` without the signatures of its stubs, which no real forward can match."""

        @classmethod
        def apply(cls, *inputs: Any) -> Any:
            """Run `forward`, and `backward` in the backward pass."""

else:
    AutogradFunction = torch.autograd.Function

# (gradient of a softmax, its output, its dimension, dtype of the scores) -> gradient of the scores. Private because
# autograd alone calls it; the public formula takes two more passes over memory.
softmax_backward: Callable[[Tensor, Tensor, int, torch.dtype], Tensor] = torch.ops.aten._softmax_backward_data

# How often a tensor was changed in place: autograd's version counter, which has no public accessor.
in_place_changes: Callable[[Tensor], int] = operator.attrgetter("_version")


@contextlib.contextmanager
def autocast_casts_kept() -> Iterator[None]:
    """Within it autocast casts each fp32 weight once, not once a forward; the casts belong to every forward's graph.

    Autocast forgets its casts where its outermost context ends; torch counts these contexts by two functions that its
    documentation leaves out.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def patch_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make `forward(module, ...)` the module's forward method; the one before it is `module.stock_forward`.

    A patch on the instance, not a subclass: names of classes and parameters stay, which engines, peft and checkpoints
    rely on.
    """
    patched: Any = module
    patched.stock_forward = module.forward
    patched.forward = types.MethodType(forward, module)


def unpatch_forward(module: nn.Module) -> None:
    """Undo `patch_forward`."""
    patched: Any = module
    del patched.forward, patched.stock_forward


@contextlib.contextmanager
def replaced(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """Within it `torch.nn.functional.NAME` is `function`, for every model, whose code looks it up at each call.

    A patch, because a TorchFunctionMode is off while `Tensor.backward` runs (that is a torch function itself), and
    gradient checkpointing repeats the forward pass there.
    """
    before = getattr(functional, name)
    setattr(functional, name, function)
    try:
        yield
    finally:
        setattr(functional, name, before)


def is_patched(module: nn.Module) -> bool:
    """Whether the instance has a forward method of its own."""
    return "forward" in vars(module)


def has_onednn_linear() -> bool:
    """Whether this build of torch has `onednn_linear`."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def has_onednn_bf16_linear() -> bool:
    """Whether `onednn_linear` computes in bf16 on this processor."""
    return has_onednn_linear() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input [..., in] @ weight.T + bias by oneDNN, with weight [out, in]; the input contiguous.

    Private because torch reaches this operator only through torch.compile.
    """
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def is_in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread; `torch.autograd` has no such query."""
    return torch._C._current_graph_task_id() != -1


def clone_default_store(prefix: str) -> Store:
    """The default process group's store, under a prefix and over a connection of its own, so any thread may use it.

    Private because torch returns no store of a group that is already initialized.
    """
    store: Any = distributed_c10d._get_default_store()
    return PrefixStore(prefix, store.clone())


def reduce_scatter(whole: Tensor, group: Any) -> Tensor:
    """This rank's sum, [n], of `whole` [ranks * n] over the ranks of a group, in the type of `whole`.

    torch 2.13 deprecates the name of 2.10 to 2.12, and these do not know the new one.
    """
    part = whole.new_empty(len(whole) // dist.get_world_size(group))
    call: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(part, whole, group=group)
    return part


def ddp_has_reduced(model: Any) -> bool:
    """Whether DDP has summed the gradients of the last backward; it waits, in silence, for one that never comes."""
    try:
        model._check_reducer_finalized()
    except RuntimeError:
        return False
    return True


def fsdp2_offloads(model: FSDPModule) -> bool:
    """Whether `fully_shard` was given a CPUOffloadPolicy; the module has no getter for its policy."""
    group = model._get_fsdp_state()._fsdp_param_group
    return group is not None and type(group.offload_policy).__name__ == "CPUOffloadPolicy"


def fsdp2_policies(model: FSDPModule) -> set[MixedPrecisionPolicy]:
    """The precision that `fully_shard` was given for each part of a model; the module has no getter for it either."""
    modules: Any = model
    return {part._get_fsdp_state()._mp_policy for part in modules.modules() if isinstance(part, FSDPModule)}


def wrapper_tensor(cls: type, size: int, dtype: torch.dtype) -> Any:
    """A tensor [size] of a subclass, without data; torch documents this constructor for tensor subclasses."""
    return Tensor._make_wrapper_subclass(cls, (size,), dtype=dtype, device="cpu")  # type: ignore[attr-defined]  (not in the stubs)


def global_offset(tensor: DTensor) -> tuple[int, ...]:
    """Where this rank's local tensor begins in the whole one, by dimension; DTensor has no public accessor for it."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset)


@functools.cache
def has_flash_varlen() -> bool:
    """Whether this build of torch has `flash_varlen` for CUDA."""
    return torch.backends.cuda.is_flash_attention_available() and hasattr(torch.ops.aten, "_flash_attention_forward")


@functools.cache
def _splits_keys() -> bool:
    """Whether this version's `flash_varlen` may split the keys of a document."""
    operator = torch.ops.aten._flash_attention_forward.default
    return "num_splits" in {argument.name for argument in operator._schema.arguments}


def flash_varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, form: Any) -> Tensor:
    """Attention within each document by torch's flash attention on CUDA, [tokens, heads, size] in 16 bits.

    `key` and `value` [tokens, key_heads, size] may have fewer heads, `bounds` are int32 [documents + 1], `form` is an
    AttentionForm without a cap. The operator
    behind `torch.nn.attention.varlen.varlen_attn`, which in torch 2.10 and 2.11 takes neither grouped heads nor a
    number of splits. Its backward pass is deterministic where `torch.use_deterministic_algorithms` is on.
    """
    operator = torch.ops.aten._flash_attention_forward.default
    # with split keys, which came with torch 2.12, the order of sums would depend on the longest document of the row
    more: Any = {"scale": form.scale, "num_splits": 1} if _splits_keys() else {"scale": form.scale}
    if form.window is not None:
        more |= {"window_size_left": form.window - 1, "window_size_right": 0 if form.causal else form.window - 1}
    return operator(query, key, value, bounds, bounds, longest, longest, 0.0, form.causal, False, **more)[0]


@functools.cache
def adds_products_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` adds products of this 16-bit type to a sum in fp32, in place.

    Tried once: only CUDA has it, and the first versions of torch that did wanted the sum in 16 bits too.
    """
    total, factor = (torch.ones(16, 16, dtype=of, device=device) for of in (torch.float32, dtype))
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((total == 17.0).all())


def product_into(total: Tensor, one: Tensor, other: Tensor, *, add: bool) -> None:
    """Write `one @ other` over `total`, or add it; of 16-bit factors to fp32 without rounding where torch has that."""
    if total.dtype == one.dtype:
        torch.addmm(total, one, other, beta=int(add), out=total)
    elif adds_products_in_fp32(total.device, one.dtype):
        torch.addmm(total, one, other, beta=int(add), out_dtype=torch.float32, out=total)
    elif add:
        total += one @ other
    else:
        total.copy_(one @ other)


@contextlib.contextmanager
def fake_products_in_fp32() -> Iterator[None]:
    """Within it fake tensors have the operator that `product_into` uses on CUDA; torch 2.13 has it there alone."""
    with torch.library._scoped_library("aten", "IMPL", "Meta") as library:
        library.impl("addmm.dtype_out", lambda *given, out, **more: out)
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes on one thread of the CPU: how threads share a sum decides its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on the host where it is on MPS, which has no float64 (torch 2.13)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
