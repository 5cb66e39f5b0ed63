"""torch 2.13: operators and tracing tools that have no public name, and replacement of functions."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if TYPE_CHECKING:

    class AutogradFunction:
        """`torch.autograd.Function` without the signatures of its stubs, which no real forward can match."""

        @classmethod
        def apply(cls, *inputs: Any) -> Any:
            """Run `forward`, and `backward` in the backward pass."""

else:
    AutogradFunction = torch.autograd.Function


@contextlib.contextmanager
def replaced_functional(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
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


def has_onednn_linear() -> bool:
    """Whether this build of torch has `onednn_linear`."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_onednn_bf16() -> bool:
    """Whether oneDNN computes in bf16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input [..., in] @ weight.T + bias by oneDNN, with weight [out, in]; the input contiguous.

    Private because torch reaches this operator only through torch.compile.
    """
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores, given that of their softmax over the last dimension and its output `weights`.

    Private because autograd alone calls it; the public formula takes two more passes over memory.
    """
    return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)


def in_place_changes(tensor: Tensor) -> int:
    """How often a tensor was changed in place: autograd's version counter, which has no public accessor."""
    return tensor._version


__all__ = ["FakeTensorMode", "TorchDispatchMode", "is_in_backward", "tree_iter"]


def is_in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread; private because `torch.autograd` has no such query."""
    return torch._C._current_graph_task_id() != -1
