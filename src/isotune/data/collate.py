"""From the plan's numbers to the tensors of one forward pass: documents end to end, no padding, no mask."""

from typing import TypedDict

import numpy as np
import torch

from isotune.data.batch_schedule import Microbatch
from isotune.data.documents import AnyDocuments, Documents, LabelledDocuments


class PackedInputs(TypedDict):
    """The keyword arguments of a packed forward pass.

    input_ids, position_ids: int64 [1, tokens]; positions restart in every document.
    cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], where each document begins and the last ends.
    max_length_q, max_length_k: tokens of the longest document.
    supervised_positions: int64 [targets], the positions that predict; targets: int64 [targets], what they predict.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    supervised_positions: torch.Tensor
    targets: torch.Tensor


class LabelledInputs(TypedDict):
    """The keyword arguments of a packed forward pass of a classifier; those of the same name as in PackedInputs.

    targets: int64 [documents], the class of each.
    """

    input_ids: torch.Tensor
    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    targets: torch.Tensor


def lay_out(documents: AnyDocuments, microbatch: Microbatch) -> PackedInputs | LabelledInputs:
    """The documents of a microbatch end to end, with their targets."""
    if isinstance(documents, LabelledDocuments):
        return collate_labelled(documents, microbatch)
    return collate(documents, microbatch)


def collate_labelled(documents: LabelledDocuments, microbatch: Microbatch) -> LabelledInputs:
    """Lay the documents of a microbatch end to end; the model itself knows how it counts positions."""
    spans = [(int(documents.starts[d]), int(documents.starts[d + 1])) for d in microbatch.documents]
    input_ids = np.concatenate([documents.input_ids[a:b] for a, b in spans]).astype(np.int64)
    lengths = [b - a for a, b in spans]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return LabelledInputs(
        input_ids=torch.from_numpy(input_ids)[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        targets=torch.from_numpy(documents.labels[list(microbatch.documents)].astype(np.int64)),
    )


def collate(documents: Documents, microbatch: Microbatch) -> PackedInputs:
    """Lay the documents of a microbatch end to end.

    The token at position p is predicted from position p - 1, so `supervised_positions` are the places before the
    supervised tokens. A document's first token is never supervised, hence no position reaches into a neighbour.
    """
    spans = [(int(documents.starts[d]), int(documents.starts[d + 1])) for d in microbatch.documents]
    input_ids = torch.from_numpy(np.concatenate([documents.input_ids[a:b] for a, b in spans]).astype(np.int64))
    supervised = np.concatenate([documents.supervised[a:b] for a, b in spans])
    lengths = [b - a for a, b in spans]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    target_positions = torch.from_numpy(np.flatnonzero(supervised).astype(np.int64))
    return PackedInputs(
        input_ids=input_ids[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        supervised_positions=target_positions - 1,
        targets=input_ids[target_positions],
    )
