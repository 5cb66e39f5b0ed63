"""From a microbatch to the tensors of one forward pass: documents end to end, without padding or mask."""

from typing import NotRequired, TypedDict

import numpy as np
import torch

from isotune.data.batch_schedule import Microbatch
from isotune.data.documents import Documents


class PackedInputs(TypedDict):
    """The keyword arguments of a packed forward pass.

    input_ids: int64 [1, tokens].
    cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], where each document begins and the last ends.
    max_length_q, max_length_k: tokens of the longest document.
    targets: int64; the classes [documents], or the supervised tokens [supervised tokens].

    For SFT only; a classifier computes its own positions:
    position_ids: int64 [1, tokens]; positions restart in every document.
    supervised_positions: int64 [supervised tokens], the positions that predict `targets`.
    """

    input_ids: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    targets: torch.Tensor
    position_ids: NotRequired[torch.Tensor]
    supervised_positions: NotRequired[torch.Tensor]


def collate(documents: Documents, microbatch: Microbatch) -> PackedInputs:
    """Lay the documents of a microbatch end to end, with their targets.

    The token at position p is predicted from position p - 1, so `supervised_positions` are the places before the
    supervised tokens. A document's first token is never supervised, hence no position reaches into a neighbour.
    """
    numbers = np.array(microbatch.documents)
    starts, tokens = documents.locate(numbers)
    lengths = np.diff(starts)
    input_ids = torch.tensor(documents.input_ids[tokens], dtype=torch.int64)
    bounds = torch.tensor(starts, dtype=torch.int32)
    if documents.has_labels:
        supervised, targets = None, torch.tensor(documents.labels[numbers], dtype=torch.int64)
    else:
        supervised = torch.tensor(np.flatnonzero(documents.supervised[tokens]))
        targets = input_ids[supervised]
    inputs = PackedInputs(
        input_ids=input_ids[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=int(lengths.max()),
        max_length_k=int(lengths.max()),
        targets=targets,
    )
    if supervised is not None:
        inputs["supervised_positions"] = supervised - 1
        inputs["position_ids"] = torch.tensor(np.arange(len(tokens)) - np.repeat(starts[:-1], lengths))[None]
    return inputs
