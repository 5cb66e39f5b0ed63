"""torch 2.13: the tracing tools that `isotune plan` measures activations with; torch exports none of them publicly."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["FakeTensorMode", "TorchDispatchMode", "is_in_backward", "tree_iter"]


def is_in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread; private because `torch.autograd` has no such query."""
    return torch._C._current_graph_task_id() != -1
