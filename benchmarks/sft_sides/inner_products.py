"""The products of a step besides those of the model's own linear layers: adapters', and attention's within documents.

Each is made on random numbers of the shapes that a step cannot do without: forward once, backward once, nothing twice.
"""

from collections.abc import Sequence
from typing import Any

import torch

QUERIES_PER_BLOCK = 128  # the causal triangle in blocks; smaller ones are less to compute and slower


class AdapterProducts:
    """The six products of every LoRA layer: two forward, and their four gradients.

    Args:
        shapes: [outputs, inputs] of each adapted layer.
        rank: of the adapters.
        tokens: rows of the activations.
    """

    def __init__(self, shapes: Sequence[torch.Size], rank: int, tokens: int, device: torch.device) -> None:
        self.shapes = shapes
        sizes = {size for shape in shapes for size in shape}
        self.activations = {size: random((tokens, size), device) for size in sizes}
        self.results = {size: torch.empty_like(tensor) for size, tensor in self.activations.items()}
        self.matrices = {size: random((rank, size), device) for size in sizes}
        self.gradients = {size: torch.empty_like(matrix) for size, matrix in self.matrices.items()}
        self.inner = random((tokens, rank), device)
        self.inner_result = torch.empty_like(self.inner)

    def multiply(self) -> None:
        """Once over all layers."""
        for outputs, inputs in self.shapes:
            x, upstream = self.activations[inputs], self.activations[outputs]
            down, up = self.matrices[inputs], self.matrices[outputs]
            torch.mm(x, down.t(), out=self.inner_result)
            torch.mm(self.inner, up, out=self.results[outputs])
            torch.mm(upstream, up.t(), out=self.inner_result)
            torch.mm(self.inner.t(), upstream, out=self.gradients[outputs])
            torch.mm(self.inner.t(), x, out=self.gradients[inputs])
            torch.mm(self.inner, down, out=self.results[inputs])


class AttentionProducts:
    """The six products of causal attention within documents: two forward, and their four gradients.

    Args:
        config: of the model: heads, head size and layers.
        lengths: tokens of each document of a step.
    """

    def __init__(self, config: Any, lengths: Sequence[int], device: torch.device) -> None:
        self.layers, self.lengths = config.num_hidden_layers, lengths
        heads, longest = config.num_attention_heads, max(lengths)
        self.rows = random((heads, longest, config.hidden_size // heads), device)
        self.weights = random((heads * QUERIES_PER_BLOCK * longest,), device)
        self.weights_result = torch.empty_like(self.weights)
        self.sums = torch.empty_like(self.rows)

    def multiply(self) -> None:
        """Once over all layers, documents and blocks."""
        for _ in range(self.layers):
            for length in self.lengths:
                for start in range(0, length, QUERIES_PER_BLOCK):
                    self._block(min(QUERIES_PER_BLOCK, length - start), min(start + QUERIES_PER_BLOCK, length))

    def _block(self, queries: int, seen: int) -> None:
        heads = len(self.rows)
        shape = (heads, queries, seen)
        count = heads * queries * seen
        weights, result = (t[:count].view(shape) for t in (self.weights, self.weights_result))
        asked, keys = self.rows[:, :queries], self.rows[:, :seen]
        for _ in range(2):  # scores, and the gradient of the weights
            torch.bmm(asked, keys.transpose(1, 2), out=result)
        for _ in range(2):  # values summed up, and the gradient of the queries
            torch.bmm(weights, keys, out=self.sums[:, :queries])
        for _ in range(2):  # the gradients of keys and values
            torch.bmm(weights.transpose(1, 2), asked, out=self.sums[:, :seen])


def random(shape: Any, device: torch.device) -> torch.Tensor:
    """Normal bf16 numbers: products of zeros may run faster."""
    return torch.randn(shape, device=device).to(torch.bfloat16)
