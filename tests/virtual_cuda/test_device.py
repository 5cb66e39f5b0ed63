"""The virtual device itself: what it computes, what it refuses as a GPU does, and what it counts."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from isotune.compat.torch import flash_varlen
from isotune.models.attention_form import AttentionForm
from isotune.models.cpu import functional as on_cpu
from isotune.models.cuda import dropout as on_cuda
from isotune.models.document_keys import MicrobatchDocuments, known_documents


def computed() -> dict[str, Any]:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8, device="cuda"), torch.randn(8, 8, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        product = x @ weight
        normed = functional.layer_norm(product, (8,))
    normed.square().sum().backward()
    halves = x[:, ::2]
    halves.zero_()
    return {
        "dtypes": [str(product.dtype), str(normed.dtype), str(weight.grad.dtype)],
        "devices": [str(t.device) for t in (product, weight.grad, halves, x.cpu())],
        "written through a view": x.cpu()[:, ::2].abs().sum().item() + (x.cpu()[:, 1::2] == 0).sum().item(),
        "error": (product.float().cpu() - x_before() @ weight.detach().cpu()).abs().max().item(),
    }


def x_before() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 8, device="cuda").cpu()


def test_autocast_views_and_gradients_are_torchs_own(virtual):
    found = virtual(computed)
    assert found["dtypes"] == ["torch.bfloat16", "torch.float32", "torch.float32"]  # CUDA's list of operators
    assert found["devices"] == ["cuda:0", "cuda:0", "cuda:0", "cpu"]
    assert found["written through a view"] == 0
    assert 0 < found["error"] < 0.1  # of bf16


def refused() -> dict[str, str]:
    device, host = torch.ones(4, 2, 8, device="cuda"), torch.ones(4, 2, 8)
    bounds = torch.tensor([0, 1, 4], dtype=torch.int32, device="cuda")
    half = device.bfloat16()
    attempts = {
        "sum of both devices": lambda: device + host,
        "product of both devices": lambda: device[0] @ host[0].t(),
        "list of both devices": lambda: torch.cat([device, host]),
        "flash attention in fp32": lambda: flash_varlen(device, device, device, bounds, 3, AttentionForm(1.0, True)),
        "flash attention with int64": lambda: flash_varlen(
            half, half, half, bounds.long(), 3, AttentionForm(1.0, True)
        ),
        "numpy": lambda: device.numpy(),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    flash_varlen(half, half, half, bounds, 3, AttentionForm(1.0, True))  # as it should be
    (device + 1.0) * torch.tensor(2.0)  # a scalar may come from the host
    return said


def test_what_a_gpu_refuses_is_refused(virtual):
    said = virtual(refused)
    assert len(said) == 6
    assert all("same device" in said[f"{name} of both devices"] for name in ("sum", "product", "list"))


def counted() -> dict[str, Any]:
    from tests.virtual_cuda import device

    x, mask = torch.arange(4.0).to("cuda"), torch.tensor([True, False, True, True]).to("cuda")
    found = {}
    asked = {
        "item": lambda: x.sum().item(),
        "tolist": lambda: x.tolist(),
        "index by a mask": lambda: x[mask],
        "nonzero": lambda: mask.nonzero(),
        "repeat_interleave": lambda: torch.repeat_interleave(x, mask.long()),
        "if": lambda: 1 if x.sum() > 2 else 0,
        "repeat_interleave of a known size": lambda: torch.repeat_interleave(x, mask.long(), output_size=3),
        "copy": lambda: torch.ones(2).to("cuda"),
        "pinned copy": lambda: torch.ones(2).pin_memory().to("cuda", non_blocking=True),
        "arithmetic": lambda: (x * 2 + 1).relu()[1:],
    }
    for name, ask in asked.items():
        with device.counting() as counts:
            ask()
        places = sorted(place.split(" <")[0] for place in counts.to_device)
        found[name] = [sum(counts.waits.values()), places, sum(counts.launches.values())]
    return found


def test_waits_copies_and_launches_are_counted(virtual):
    found = virtual(counted)
    waits = {name: count for name, (count, _, _) in found.items()}
    assert all(waits.pop(name) == 0 for name in ("repeat_interleave of a known size", "arithmetic"))
    assert waits.pop("copy") == waits.pop("pinned copy") == 0
    assert all(count >= 1 for count in waits.values()), waits
    assert "pageable" in found["copy"][1][0] and "pinned" in found["pinned copy"][1][0]
    assert found["arithmetic"][2] == 3  # a view launches nothing


def masks(shape: list[int], lengths: list[int], dtype: str) -> bool:
    """Whether dropout's masks on the device are those on CPU."""
    documents = MicrobatchDocuments([5, 10**6, 2], lengths)
    found = []
    for place, drop in (("cpu", on_cpu.dropout), ("cuda", on_cuda.dropout)):
        torch.manual_seed(1)
        with known_documents(documents):
            found.append(drop(torch.ones(shape, dtype=getattr(torch, dtype), device=place), 0.3).cpu())
    return torch.equal(*found) and 0 < int((found[0] == 0).sum()) < found[0].numel()


@pytest.mark.parametrize("shape", [[1, 30, 33], [30, 8], [3, 16], [1, 30, 4, 6]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropouts_masks_are_those_of_the_cpu(virtual, shape: list[int], dtype: str):
    assert virtual(masks, shape=shape, lengths=[20, 3, 7], dtype=dtype)


def flash(causal: bool, key_heads: int) -> dict[str, float]:
    """Against attention in fp64 of each document, and the gradients likewise."""
    generator, lengths = torch.Generator().manual_seed(0), [3, 1, 9]
    host = [torch.randn(13, heads, 8, generator=generator).bfloat16() for heads in (4, key_heads, key_heads)]
    bounds = torch.tensor([0, 3, 4, 13], dtype=torch.int32, device="cuda")
    given = [t.to("cuda").requires_grad_() for t in host]
    exact = [t.double().requires_grad_() for t in host]
    out = flash_varlen(given[0], given[1], given[2], bounds, 9, AttentionForm(0.3, causal))
    parts = zip(*(t.transpose(0, 1)[None].split(lengths, 2) for t in exact), strict=True)
    expected = torch.cat(
        [
            functional.scaled_dot_product_attention(*part, is_causal=causal, scale=0.3, enable_gqa=True)
            for part in parts
        ],
        dim=2,
    )[0].transpose(0, 1)
    upstream = torch.randn(expected.shape, generator=generator).bfloat16()
    pairs = zip(
        [out, *torch.autograd.grad(out, given, upstream.to("cuda"))],
        [expected, *torch.autograd.grad(expected, exact, upstream.double())],
        strict=True,
    )
    return {str(i): ((a.cpu().double() - b).norm() / b.norm()).item() for i, (a, b) in enumerate(pairs)}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_flash_attention_is_attention_within_each_document(virtual, causal: bool, key_heads: int):
    errors = virtual(flash, causal=causal, key_heads=key_heads)
    assert len(errors) == 4 and all(error < 5e-3 for error in errors.values()), errors
