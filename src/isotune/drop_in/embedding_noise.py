"""Noise on the embeddings of a document in training (NEFTune: Jain et al. 2023, arXiv:2310.05914), the document's own.

The libraries scale it by the padded length of a batch and draw it for the batch, so it depends on the neighbours. Here
a document of L tokens and embeddings of size d gets uniform noise of at most alpha / sqrt(L d), from its own keys.
"""

import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from isotune.models.document_keys import (
    ELEMENTS_PER_WORD,
    RESOLUTION,
    current_documents,
    draw_call_key,
    mixed,
    word_steps,
)

_hooks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()  # of embeddings with noise


def set_noise(embeddings: nn.Module, alpha: float | None) -> None:
    """Let embeddings add noise while a microbatch trains, or none any more (`alpha` None)."""
    if (before := _hooks.pop(embeddings, None)) is not None:
        before.remove()
    if alpha is None:
        return

    def hook(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        documents = current_documents()
        if not module.training or documents is None:
            return output
        features = output.shape[-1]
        steps, keys = word_steps(features), documents.line_keys(output.shape, draw_call_key())
        words = np.empty((len(keys), len(steps)), np.uint64)
        mixed(keys, steps, words, np.empty_like(words))
        numbers = words.view(np.uint16).reshape(len(keys), len(steps) * ELEMENTS_PER_WORD)[:, :features]
        uniform = (numbers.astype(np.float32) + 0.5) * (2 / RESOLUTION) - 1
        by_token, _ = documents.axes(output.shape)
        lines = documents.lengths if by_token else [len(keys) // len(documents.lengths)] * len(documents.lengths)
        largest = alpha / np.sqrt(np.repeat(np.asarray(documents.lengths), lines) * features)
        noise = torch.from_numpy(uniform * largest[:, None].astype(np.float32)).view(output.shape)
        return output + noise.to(output.device, output.dtype)

    _hooks[embeddings] = embeddings.register_forward_hook(hook)
