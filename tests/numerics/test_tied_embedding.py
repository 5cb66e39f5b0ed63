"""The slim gradient of a tied embedding against autograd's own, bit for bit, and the memory that it does not take."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from isotune.models.cpu.layers import slim_tied_embedding
from isotune.models.supervised_loss import supervised_loss

WORDS, SIZE, PADDING = 4_000, 48, 1
IDS = torch.tensor([[5, 7, 5, 5, PADDING, 9, 3999, 7, 5, 0]])
TARGETS = torch.tensor([7, 5, 5, 2, 9, 3999, 7, 5, 0, 12])


class _Model(nn.Module):
    def __init__(self, tied: bool = True, padding_idx: int | None = PADDING) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, SIZE, padding_idx=padding_idx)
        self.inner, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        def body(ids: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.inner(self.embedding(ids)))

        hidden: Any = checkpoint(body, ids, use_reentrant=False) if recompute else body(ids)
        return supervised_loss(hidden[0], self.head.weight, None, TARGETS)


def _gradients(model: _Model, passes: int = 1, **how: Any) -> list[torch.Tensor]:
    model.zero_grad()
    for number in range(passes):
        model(IDS.roll(number), **how).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return gradients


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("padding_idx", [None, PADDING])
def test_the_gradients_are_autograds_to_the_bit(padding_idx: int | None, recompute: bool, passes: int):
    plain, slim = _Model(padding_idx=padding_idx), _Model(padding_idx=padding_idx)
    assert slim_tied_embedding(slim)
    found = _gradients(slim, passes, recompute=recompute)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(plain, passes), found, strict=True))
    assert not any(g.is_sparse for g in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_every_type_of_weights(dtype: torch.dtype):
    plain, slim = _Model().to(dtype), _Model().to(dtype)
    assert slim_tied_embedding(slim)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(plain), _gradients(slim), strict=True))


def test_no_second_gradient_of_the_embeddings_size_is_made():
    def made(model: _Model) -> int:
        loss = model(IDS)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            loss.backward()
        blocks = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        return sum(size >= model.embedding.weight.nbytes for size in blocks)

    plain, slim = _Model(), _Model()
    slim_tied_embedding(slim)
    for model in (plain, slim):
        _gradients(model)
    assert (made(plain), made(slim)) == (1, 0)  # the head's own was made with the loss


def test_only_a_plain_trained_tied_embedding_is_changed():
    frozen = _Model()
    frozen.embedding.weight.requires_grad_(False)
    scaled = _Model()
    scaled.embedding.scale_grad_by_freq = True
    for model in (_Model(tied=False), frozen, scaled, nn.Linear(2, 2)):
        assert not slim_tied_embedding(model)
    once = _Model()
    assert slim_tied_embedding(once) and not slim_tied_embedding(once)


def test_a_gradient_that_no_gradient_of_the_head_can_take_is_never_lost_in_silence():
    model = _Model()
    slim_tied_embedding(model)
    with pytest.raises(RuntimeError, match="the head, to which it is tied, has none"):
        model.embedding(IDS).sum().backward()
    _gradients(model)
