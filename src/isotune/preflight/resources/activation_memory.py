"""What one pass holds in memory besides weights: the training code itself runs on tensors that have no contents.

A formula for activations is wrong as soon as a model or a kernel changes. Here the model is built on the meta device,
a pass goes forward and backward under torch's FakeTensorMode, and every storage that comes and goes is counted. The
blocks of a model are alike, so two and three of them say what all of them hold, in seconds for any size.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from isotune.models import classifier, packed_attention, supervised_loss
from isotune.models.cpu import cast_linear, document_attention, dropout, fused_lora, tied_embedding
from isotune.models.cpu.speedups import enable_speedups, training_microbatch

FEW_BLOCKS = (2, 3)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a pass on one process, at its fullest moment.

    Attributes:
        activations: beside whole gradients: what is there when a later pass of the same step runs.
        with_gradients: activations and gradients together, when the first pass makes the gradients.
    """

    activations: int
    with_gradients: int


def trace_pass(
    build: Callable[[int], nn.Module],
    layers: int,
    lengths: Sequence[int],
    targets: int,
    *,
    is_classifier: bool,
    autocast: torch.dtype | None,
    on_cpu: bool,
    checkpointing: bool,
) -> PassMemory:
    """The memory of a forward and backward pass over documents of these lengths.

    Args:
        build: the model ready for training but for speedups, with that many blocks, on the meta device.
        layers: blocks of the real model.
        lengths: tokens of each document.
        targets: supervised tokens, or documents in classification.
        is_classifier: whether the model is one.
        autocast: type of the products, None for the weights' own.
        on_cpu: with the CPU's kernels; else with attention and dropout as a GPU keeps them.
        checkpointing: recompute each block's activations in the backward pass.
    """

    def trace(blocks: int) -> tuple[int, ...]:
        model = build(blocks)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return _trace(model, _inputs(lengths, targets, is_classifier), autocast, on_cpu)

    few = [trace(blocks) for blocks in FEW_BLOCKS if blocks < layers]
    if len(few) < len(FEW_BLOCKS):
        besides, early, late = trace(layers)
    else:
        besides, early, late = (low + (layers - FEW_BLOCKS[0]) * (high - low) for low, high in zip(*few, strict=True))
    return PassMemory(besides, max(early, late))


def _inputs(lengths: Sequence[int], targets: int, is_classifier: bool) -> dict[str, Any]:
    tokens = sum(lengths)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "targets": torch.zeros(targets, dtype=torch.int64),
    }
    if not is_classifier:
        inputs["position_ids"] = torch.zeros(1, tokens, dtype=torch.int64)
        inputs["supervised_positions"] = torch.zeros(targets, dtype=torch.int64)
    return inputs


def _trace(model: nn.Module, inputs: dict[str, Any], autocast: torch.dtype | None, on_cpu: bool) -> tuple[int, ...]:
    """The most beside whole gradients, and with gradients while fewer than half of them are there, and after.

    Activations go as gradients come, so the most is at one end of the backward pass; which, depends on the blocks.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _without_contents(inputs["input_ids"].numel(), on_cpu):
        _give_storage(model)
        if on_cpu:
            enable_speedups(model)
        model.train()
        live = _LiveBytes(model, on_cpu)
        products = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
        with live, products, training_microbatch(model) if on_cpu else contextlib.nullcontext():
            model(**inputs, use_cache=False).loss.backward()
    return live.most_besides_gradients, *live.most


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, while they live; a parameter's gradient is counted apart."""

    def __init__(self, model: nn.Module, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.now = self.gradients = self.most_besides_gradients = 0
        self.most = [0, 0]
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # the embedding's gradient is the last of all, and does not count in what the blocks have made
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.half = sum(parameter.nbytes for parameter in parameters if parameter is not embedding.weight) / 2
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1:
            # autograd adds up two gradients of one tensor in place, but not those of a tensor subclass such as a fake
            one, other = args[:2]
            if isinstance(other, torch.Tensor) and one.shape == other.shape and one.dtype == other.dtype:
                return one
        results = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen and id(storage) not in given:
                    self._count(storage)
        if self.on_cpu and torch.Tag.pointwise in func.tags:
            self._most_is_at_least(self.now + _casts(args))
        return results

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        weakref.finalize(storage, self._gone, size)
        self._most_is_at_least(self.now)

    def _most_is_at_least(self, size: int) -> None:
        late = self.gradients > self.half
        self.most[late] = max(self.most[late], size)
        self.most_besides_gradients = max(self.most_besides_gradients, size - self.gradients)

    def _gone(self, size: int) -> None:
        self.now -= size

    def _is_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.gradients += parameter.grad.untyped_storage().nbytes()


def _casts(args: Any) -> int:
    """Bytes that torch on CPU fills for a moment inside an elementwise operation on numbers of several types."""
    tensors = [t for t in tree_iter(args) if isinstance(t, torch.Tensor) and t.dim()]
    if len({t.dtype for t in tensors}) < 2:
        return 0
    common = reduce(torch.promote_types, (t.dtype for t in tensors))
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common)


def _give_storage(model: nn.Module) -> None:
    """Put a fake tensor in the place of every meta tensor of `model`; what was tied stays tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                held[name] = made[id(tensor)]  # type: ignore[assignment]


@contextlib.contextmanager
def _without_contents(tokens: int, on_cpu: bool) -> Iterator[None]:
    """Within it nothing asks for a number that only a real tensor has, and a GPU's kernels are stood in for.

    A GPU's attention keeps query, key, value, result and one number a row, as torch's SDPA does on CPU; its dropout
    keeps a byte an element.
    """
    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for module in (dropout, fused_lora, document_attention):
        replace(module, "draw_seed", lambda: 0)
    replace(document_attention, "keep_mask", lambda shape, *_: torch.empty(*shape, dtype=torch.int16))
    for module in (dropout, fused_lora):
        replace(module, "draw_kept", lambda shape, *_: torch.empty(*shape, dtype=torch.bool))
        replace(module, "pack_kept", lambda kept: torch.empty((kept.numel() + 7) // 8, dtype=torch.uint8))
        replace(module, "unpack_mask", lambda _, shape: torch.empty(*shape, dtype=torch.int16))
    replace(tied_embedding, "occurring_rows", lambda ids, grad: (ids, grad.clone()))  # at most as many as tokens
    for module in (cast_linear, fused_lora, tied_embedding):
        replace(module, "is_whole", lambda _: True)  # a fake parameter has a type of its own
    replace(classifier, "document_position_ids", lambda *_: torch.zeros(1, tokens, dtype=torch.int64))
    if not on_cpu:
        replace(packed_attention, "kernel_in_effect", lambda *_, **__: packed_attention.DOCUMENT_SDPA)
        replace(functional, "dropout", _dropout_as_on_gpu)
        replace(supervised_loss, "is_cpu", lambda _: False)
    supervised_loss.forget_workspaces()
    try:
        yield
    finally:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        supervised_loss.forget_workspaces()


def _dropout_as_on_gpu(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
