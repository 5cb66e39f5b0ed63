"""Predictions and labels of rows in the form in which the libraries hand them to `compute_metrics`."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from isotune.data.datasets import IGNORED
from isotune.data.documents import Documents
from isotune.io.errors import UserError
from isotune.training.tasks import EvaluationRun


@torch.no_grad()
def predictions_of(
    run: EvaluationRun, labels: Callable[[int], np.ndarray] | None, prepare: Callable[..., Any] | None, *, causal: bool
) -> Any:
    """What the model says of each row, [rows, ...] in their order, filled up with -100 where rows differ in length.

    `prepare` is the user's `preprocess_logits_for_metrics`, called with the logits of one row and its labels, or None;
    it may return several tensors, of which then each is an array.
    """
    own: list[tuple[int, list[np.ndarray], bool]] = []
    for microbatch, found in run.outputs(targets=False):
        if not microbatch.weight:
            continue
        lengths = run.documents.lengths[list(microbatch.documents)].tolist()
        logits = found.logits[0].split(lengths) if causal else found.logits
        for document, of_row in zip(microbatch.documents, logits, strict=True):
            made = of_row[None]
            if prepare is not None:
                own_labels = None if labels is None else torch.from_numpy(labels(document)[None]).to(made.device)
                made = prepare(made, own_labels)
            parts = made if isinstance(made, (tuple, list)) else (made,)
            if any(part.ndim == 0 for part in parts):
                raise UserError("preprocess_logits_for_metrics returns a single number: it keeps the axis of the rows")
            own.append((document, [_array(part[0]) for part in parts], parts is made))
    rows = {document: (arrays, several) for document, arrays, several in gather_object(own)}
    columns = list(zip(*(rows[row][0] for row in range(len(run.documents))), strict=True))
    stacked = [stacked_rows(list(column)) for column in columns]
    return tuple(stacked) if rows[0][1] else stacked[0]


def tokens_of(documents: Documents, row: int, *, supervised_only: bool = False) -> np.ndarray:
    """The token ids of a row, int64 [tokens]; with -100 where nothing is supervised, where that is asked for."""
    span = slice(documents.starts[row], documents.starts[row + 1])
    tokens = documents.input_ids[span].astype(np.int64)
    return np.where(documents.supervised[span], tokens, IGNORED) if supervised_only else tokens


def stacked_rows(arrays: list[np.ndarray]) -> np.ndarray:
    """Rows as one array, filled up with -100 on the right to the longest."""
    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays)
    whole = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), IGNORED, arrays[0].dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[: len(array)] = array
    return whole


def rows_of(make: Callable[[int], np.ndarray], rows: Iterable[int]) -> np.ndarray:
    """What `make` returns for each row, stacked."""
    return stacked_rows([make(row) for row in rows])


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
