"""Activation memory and traffic of a microbatch, traced by running the training code on fake tensors.

A formula for activations becomes wrong as soon as a model or a kernel changes. Here the model is built on the meta
device, a microbatch runs forward and backward under torch's FakeTensorMode, and every storage is counted while it
lives. The blocks of a model are alike, so models of two and three blocks give the memory of any number of blocks.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

from isotune.compat import torch as compat
from isotune.compat.torch import FakeTensorMode, TorchDispatchMode, is_in_backward, tree_iter
from isotune.compat.transformers import attention_of
from isotune.models import document_keys, packed_attention, supervised_loss
from isotune.models.cpu import document_attention
from isotune.models.cpu import functional as cpu_functional
from isotune.models.cpu import layers as cpu_layers
from isotune.models.cpu.layers import enable_speedups
from isotune.models.cuda import loss_head
from isotune.models.cuda.casts import kept_casts
from isotune.models.document_dropout import training_microbatch
from isotune.models.layouts import layout
from isotune.preflight.resources.traffic import Traffic, TrafficCounter

TRACED_BLOCKS = (2, 3)
# Bytes of a logit that torch's operators move and the loss kernel does not: the parameters of the time model were
# fitted with them, and keep them until they are fitted anew.
FITTED_LOGIT_BYTES = 40


@dataclass(frozen=True)
class MicrobatchMemory:
    """Peak bytes of a microbatch on a process, and what its kernels move."""

    activations: int  # without gradients, as in a later microbatch of a step
    with_gradients: int  # activations and gradients together, as in the first microbatch
    traffic: Traffic = field(default_factory=Traffic)


def trace_microbatch(
    build: Callable[[int | None], Any],
    layers: int | None,
    lengths: Sequence[int],
    targets: int,
    *,
    is_classifier: bool,
    autocast: torch.dtype | None,
    on_cpu: bool,
    checkpointing: bool,
) -> MicrobatchMemory:
    """The memory of forward and backward over a microbatch of documents of so many tokens (`lengths`).

    `build` makes the model with a number of blocks, or all, on the meta device, without the CPU's speedups; the real
    one has `layers`, None where it is traced whole. `targets` is the number of supervised tokens, or of documents in
    classification. `on_cpu` uses the CPU's kernels; otherwise attention and dropout save what a GPU's save.
    """

    def trace(blocks: int | None) -> tuple[tuple[int, ...], Traffic]:
        """Peak bytes without gradients, and with gradients before and after half of them exist; and the traffic.

        Activations are freed while gradients appear, so the peak is at the start or at the end of backward, which
        depends on the blocks.
        """
        model, inputs = build(blocks), _inputs(lengths, targets, is_classifier)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with FakeTensorMode(allow_non_fake_inputs=True), _fake_kernels(sum(lengths), on_cpu):
            _replace_meta_tensors(model)
            if on_cpu:
                enable_speedups(model)
            model.train()
            live, traffic = _LiveBytes(model, on_cpu), TrafficCounter()
            products = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
            padded = attention_of(model.config) != packed_attention.PACKED
            documents = document_keys.MicrobatchDocuments(range(len(lengths)), lengths, padded)
            casts = contextlib.nullcontext() if on_cpu or not autocast else kept_casts()
            with live, traffic, products, casts, training_microbatch(documents) if on_cpu else contextlib.nullcontext():
                model(**inputs, use_cache=False).loss.backward()
        counted = traffic.counted
        if not on_cpu and not is_classifier:
            logits = targets * model.config.get_text_config().vocab_size
            counted = replace(counted, elementwise_bytes=counted.elementwise_bytes + FITTED_LOGIT_BYTES * logits)
        return (live.activation_peak, *live.peaks), counted

    few, more = TRACED_BLOCKS
    if layers is None or layers <= more:
        (activations, early, late), moved = trace(layers)
    else:
        (lows, moved), (highs, moved_more) = trace(few), trace(more)
        moved = moved.extrapolate(moved_more, layers - few)
        activations, early, late = (low + (layers - few) * (high - low) for low, high in zip(lows, highs, strict=True))
    return MicrobatchMemory(activations, max(early, late), moved)


def _inputs(lengths: Sequence[int], targets: int, is_classifier: bool) -> dict[str, Any]:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    of_tokens, of_targets = (torch.zeros(shape, dtype=torch.int64) for shape in ((1, sum(lengths)), (targets,)))
    inputs: dict[str, Any] = {"input_ids": of_tokens, "targets": of_targets}
    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    inputs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return inputs if is_classifier else inputs | {"position_ids": of_tokens, "supervised_positions": of_targets}


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from their creation to their end; gradients of parameters are counted separately."""

    def __init__(self, model: nn.Module, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.live = self.gradients = self.activation_peak = 0
        self.peaks = [0, 0]  # while fewer than half of the gradients exist, and after
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # without the embedding's gradient, which appears last and is not part of the blocks
        language_model: Any = model
        embedding = language_model.get_input_embeddings().weight
        self.half_of_gradients = sum(parameter.nbytes for parameter in parameters if parameter is not embedding) / 2
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and is_in_backward() and not torch.is_grad_enabled():
            # autograd accumulates gradients in place, but not those of a tensor subclass such as a fake tensor; with
            # gradients on, it is a sum of the forward pass that checkpointing repeats
            one, other = args[:2]
            if isinstance(other, torch.Tensor) and one.shape == other.shape and one.dtype == other.dtype:
                return one
        results = func(*args, **(kwargs or {}))
        inputs = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen and id(storage) not in inputs:
                    self._count(storage)
        if self.on_cpu and torch.Tag.pointwise in func.tags:
            self._update_peaks(self.live + _cast_bytes(args))
        return results

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        weakref.finalize(storage, self._free, size)
        self._update_peaks(self.live)

    def _update_peaks(self, size: int) -> None:
        is_late = self.gradients > self.half_of_gradients
        self.peaks[is_late] = max(self.peaks[is_late], size)
        self.activation_peak = max(self.activation_peak, size - self.gradients)

    def _free(self, size: int) -> None:
        self.live -= size

    def _add_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.gradients += parameter.grad.untyped_storage().nbytes()


def _cast_bytes(args: Any) -> int:
    """Bytes of the temporary casts inside an elementwise operation on several dtypes, as torch makes them on CPU."""
    tensors = [t for t in tree_iter(args) if isinstance(t, torch.Tensor) and t.dim()]
    if len({t.dtype for t in tensors}) < 2:
        return 0
    common = reduce(torch.promote_types, (t.dtype for t in tensors))
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common)


def _replace_meta_tensors(model: nn.Module) -> None:
    """Replace every meta tensor of `model` by a fake CPU tensor; tied tensors stay tied."""
    replacements: dict[int, torch.Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *buffers]:
            if id(tensor) not in replacements:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                replacements[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(module, name, replacements[id(tensor)])


@contextlib.contextmanager
def _fake_kernels(tokens: int, on_cpu: bool) -> Iterator[None]:
    """Within it no code reads a value of a tensor, and stand-ins replace a GPU's kernels.

    A GPU's attention saves query, key, value, output and a number for each row, as torch's SDPA does on CPU; its
    dropout saves a byte for each element; its loss head has Triton's kernel.
    """
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, stand_in: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, stand_in))

        for module in (cpu_functional, document_keys):
            replace(module, "draw_call_key", lambda: 0)
        for module in (cpu_functional, document_attention):
            replace(module, "draw_kept", lambda keys, features, _: torch.empty(len(keys), features, dtype=torch.bool))
        for module in (cpu_functional, cpu_layers):
            replace(module, "pack_kept", lambda kept: torch.empty((kept.numel() + 7) // 8, dtype=torch.uint8))
            replace(module, "unpack_mask", lambda _, shape: torch.empty(*shape, dtype=torch.int8))
        replace(cpu_layers, "occurring_rows", lambda ids, grad: (ids, grad.clone()))  # an upper bound
        replace(cpu_layers, "is_whole", lambda _: True)  # a fake parameter has another type
        replace(layout, "document_position_ids", lambda *_: torch.zeros(1, tokens, dtype=torch.int64))
        if not on_cpu:
            replace(packed_attention, "kernel_in_effect", lambda *_, **__: packed_attention.DOCUMENT_SDPA)
            replace(functional, "dropout", _dropout_as_on_gpu)
            replace(loss_head, "triton_kernel", lambda _: _loss_kernel_as_on_gpu)
            replace(compat, "adds_products_in_fp32", lambda *_: True)
            stack.enter_context(compat.fake_products_in_fp32())
        supervised_loss.forget_workspaces()
        stack.callback(supervised_loss.forget_workspaces)
        yield


def _dropout_as_on_gpu(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _loss_kernel_as_on_gpu(logits: torch.Tensor, *given: Any) -> None:
    logits.amax(1)  # reads them once, and then again as it writes over them
    logits.neg_()
