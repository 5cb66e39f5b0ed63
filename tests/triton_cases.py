"""What Triton's kernels compute, against the CPU's code and fp64: on a GPU, or by Triton's interpreter without one.

Each function takes what JSON can hold and returns such, so that a process of its own can call it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import cross_entropy

from isotune.models import supervised_loss as loss_module
from isotune.models.cpu import functional as on_cpu
from isotune.models.cuda import dropout as on_cuda
from isotune.models.cuda import loss_head
from isotune.models.document_keys import MicrobatchDocuments, known_documents
from isotune.models.supervised_loss import LogitsTransform, supervised_loss
from tests.virtual_cuda.device import quiet


@contextmanager
def kernels() -> Iterator[list[str]]:
    """Within it the kernels run: compiled on a GPU, and elsewhere in the interpreter. Yields their calls."""
    calls: list[str] = []
    with ExitStack() as within:
        for module in (on_cuda, loss_head):
            within.enter_context(mock.patch.object(module, "triton_runs", lambda: True))
        for module, name in ((on_cuda, "_triton_kernel"), (loss_head, "triton_kernel")):
            run = getattr(module, name)(torch.device("cuda"))

            def counted(*given: Any, run: Callable[..., Any] = run, name: str = module.__name__) -> Any:
                calls.append(name.rpartition(".")[2])
                with quiet():  # the interpreter copies tensors of the virtual device to the host and back
                    return run(*given)

            choose = lambda device, counted=counted: counted  # noqa: E731
            within.enter_context(mock.patch.object(module, name, choose))
        yield calls


# ---- dropout ----

DROPOUTS: dict[str, dict[str, Any]] = {
    "packed": {"shape": [1, 21, 300], "numbers": [9, 4, 10**6, 2], "lengths": [5, 10, 1, 5]},
    "odd sizes": {"shape": [11, 7], "numbers": [0, 2**40 + 1], "lengths": [10, 1]},
    "one element": {"shape": [1, 1], "numbers": [2**62], "lengths": [1], "p": 0.5},
    "documents": {"shape": [3, 257], "numbers": [7, 0, 8], "lengths": [4, 4, 4]},
    "padded": {"shape": [6, 33], "numbers": [7, 3], "lengths": [5, 2], "padded": True},
    "nearly all": {"shape": [1, 5, 512], "numbers": [1], "lengths": [5], "p": 0.99},
}
DTYPES = ("float32", "bfloat16", "float16")


def dropout(device: str, name: str, dtype: str, seed: int = 3) -> dict[str, Any]:
    """Output and gradient of the kernel against those of the CPU: equal masks, and the largest relative difference."""
    case = {"p": 0.1, "padded": False, **DROPOUTS[name]}
    documents = MicrobatchDocuments(case["numbers"], case["lengths"], case["padded"])
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.rand(case["shape"], generator=generator).add(0.5).to(getattr(torch, dtype)) for _ in range(2))

    def run(drop: Callable[..., torch.Tensor], place: str) -> list[torch.Tensor]:
        given = x.to(place).requires_grad_()
        torch.manual_seed(seed)
        with known_documents(documents):
            out = drop(given, case["p"])
            (gradient,) = torch.autograd.grad(out, given, upstream.to(place))
        return [t.detach().cpu() for t in (out, gradient)]

    expected = run(on_cpu.dropout, "cpu")
    with kernels() as calls:
        found = run(on_cuda.dropout, device)
    pairs = list(zip(found, expected, strict=True))
    return {
        "calls": calls,
        "dtypes": [str(t.dtype) for t in found],
        "same masks": all(torch.equal(a == 0, b == 0) for a, b in pairs),
        "dropped": int((expected[0] == 0).sum()),
        "kept": int((expected[0] != 0).sum()),
        "difference": max(
            ((a.double() - b.double()).abs() / b.double().abs().clamp(min=1)).max().item() for a, b in pairs
        ),
    }


# ---- the loss head ----

# vocabularies below, at and above a block of the kernel, and no multiples of it
CHUNK = 4
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {"vocabulary": 211, "bias": False, "positions": 37},
    "a block": {"vocabulary": 4096, "bias": False},
    "blocks and a bit": {"vocabulary": 9001, "bias": True},
    "scaled": {"vocabulary": 4097, "bias": True, "scale": 0.3},
    "capped": {"vocabulary": 4099, "bias": False, "cap": 3.0},
    "scaled and capped": {"vocabulary": 211, "bias": True, "scale": 1.7, "cap": 3.0},
    "no targets": {"vocabulary": 211, "bias": True, "positions": 0},
}


def loss(device: str, name: str, dtype: str) -> dict[str, Any]:
    """Loss and gradients of the kernel's head: relative errors against fp64, and differences from torch's operators."""
    case = {"positions": 7, "scale": 1.0, "cap": None, **LOSSES[name]}
    generator, size, vocabulary = torch.Generator().manual_seed(2), 24, case["vocabulary"]
    shapes = [(case["positions"], size), (vocabulary, size), *([(vocabulary,)] if case["bias"] else [])]
    given = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]
    targets = torch.randint(0, vocabulary, (case["positions"],), generator=generator)
    targets[-1:] = vocabulary - 1
    transform = LogitsTransform(case["scale"], case["cap"])

    def run(place: str) -> list[torch.Tensor]:
        tensors = [t.to(place).requires_grad_() for t in given]
        bias = tensors[2] if case["bias"] else None
        summed = supervised_loss(tensors[0], tensors[1], bias, targets.to(place), transform)
        assert summed.dtype == torch.float32
        found = [summed.detach(), *torch.autograd.grad(summed, tensors)]
        assert [t.dtype for t in found[1:]] == [t.dtype for t in given]
        return [t.cpu().double() for t in found]

    exact = [t.double().requires_grad_() for t in given]
    logits = (exact[0] @ exact[1].t() + (exact[2] if case["bias"] else 0.0)) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    summed = cross_entropy(logits, targets, reduction="sum")
    expected = [summed.detach(), *torch.autograd.grad(summed, exact)]
    torchs = run("cpu")
    # several chunks, the last one shorter
    few = {"FEWEST_POSITIONS": CHUNK, "MOST_POSITIONS": CHUNK}
    with kernels() as calls, mock.patch.multiple(loss_head, **few):
        found = run(device)
    names = ("loss", "hidden", "weight", "bias")

    def relative(one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
        norms = zip(names, one, other, strict=False)
        return {name: ((a - b).norm() / max(b.norm().item(), 1e-300)).item() for name, a, b in norms}

    return {"calls": calls, "errors": relative(found, expected), "torch": relative(torchs, expected),
            "difference": relative(found, torchs), "zeros": not any(t.any() for t in found)}  # fmt: skip


def edges(device: str) -> dict[str, Any]:
    """Certain and hopeless predictions, a row whose first block is -inf, and what evaluation leaves of the logits."""
    with kernels() as calls:
        run = loss_head.triton_kernel(torch.device(device))
        assert run is not None
        hidden = torch.tensor([[200.0, 0, 0, 0]] * 2, device=device, requires_grad=True)
        summed = supervised_loss(hidden, torch.eye(4, device=device), None, torch.tensor([0, 1], device=device))
        (gradient,) = torch.autograd.grad(summed, hidden)
        with torch.no_grad():
            evaluated = supervised_loss(hidden, torch.eye(4, device=device), None, torch.tensor([0, 1], device=device))
        logits = torch.full((1, 5000), -torch.inf, device=device)
        logits[0, 4500:] = 0.0
        losses = torch.empty(1, device=device)
        run(logits, torch.tensor([4999], device=device), None, losses, 1.0, None, 1.0, True)
    return {"summed": summed.item(), "gradient": gradient.tolist(), "evaluated": evaluated.item(),
            "late": losses.item(), "late gradient": [logits[0, n].item() for n in (0, 4500, 4999)],
            "calls": len(calls)}  # fmt: skip


def half_precision(device: str) -> float:
    """Of a million tokens that are all as likely: the relative error of what they add to a gradient in fp16."""
    weight = (1 + 0.1 * torch.randn(1_000_000, 4, generator=torch.Generator().manual_seed(4))).half()
    hidden = torch.zeros(1, 4).half().to(device).requires_grad_()
    with kernels():
        supervised_loss(hidden, weight.to(device), None, torch.tensor([0], device=device)).backward()
    assert hidden.grad is not None and loss_module.FP16_SCALE > 1
    pull, expected = hidden.grad.cpu().double()[0] + weight[0].double(), weight.double().mean(0)
    return ((pull - expected).norm() / expected.norm()).item()
