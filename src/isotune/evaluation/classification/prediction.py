"""A classifier's logits for every row: unpadded, on one process or many, independent of the batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from isotune.data.batch_schedule import ATTENTION_PARITY_TOKENS, Microbatch, collate
from isotune.data.documents import Documents
from isotune.evaluation.classification.models import Classifier
from isotune.evaluation.distributed_eval import Ranks
from isotune.io.errors import UserError
from isotune.models.classifier import fast_evaluation

# tokens of one forward: more exceed a CPU's caches, and fewer leave a GPU idle
BATCH_TOKENS = {"cpu": 4_096, "cuda": 65_536}


@torch.inference_mode()
def classify(
    classifier: Classifier,
    documents: Documents,
    ranks: Ranks,
    *,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """The logits of every document: float64 [documents, classes], the same on every rank.

    Documents are packed without padding into batches of up to `batch_tokens` tokens and `batch_size` documents; none
    attends to another, so the batches change a logit by no more than the rounding of its matrix products.

    Raises:
        RunFault: a row came from no process or from two.
    """
    device = next(classifier.model.parameters()).device
    lengths = documents.lengths
    limit = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    batches = list(_batches(lengths, limit, batch_size or len(documents)))
    costs = [float((lengths[rows] * (1 + lengths[rows] / ATTENTION_PARITY_TOKENS)).sum()) for rows in batches]
    logits_of: dict[int, np.ndarray] = {}
    own = ranks.share(costs)
    bar = tqdm(total=sum(len(batches[number]) for number in own), unit=" documents", disable=not progress)
    with bar, fast_evaluation(classifier.model):
        for number in own:
            rows = tuple(batches[number].tolist())
            tokens = int(lengths[batches[number]].sum())
            inputs: Any = collate(documents, Microbatch(number, rows, tokens, len(rows), costs[number]))
            del inputs["targets"]
            moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
            logits = classifier.model(**moved).logits.double().cpu().numpy()
            logits_of.update(zip(rows, logits, strict=True))
            bar.update(len(rows))
    return np.stack(list(ranks.gather(logits_of, count=len(documents)).values()))


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """Softmax in float64: [rows, classes]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def check_finite(logits: np.ndarray, ids: Sequence[Any], name: str) -> None:
    """Refuse predictions of a broken model.

    Raises:
        UserError: some logits are NaN or Inf; the message has their number and the first id.
    """
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise UserError(
            f"{name} gives {len(broken)} of {len(logits)} rows a logit that is not finite, id {ids[broken[0]]!r} "
            "first: nothing was written"
        )


def _batches(lengths: np.ndarray, batch_tokens: int, batch_size: int) -> Iterator[np.ndarray]:
    """Documents by length, the longest first, in batches; a document longer than `batch_tokens` is alone."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        tokens = np.cumsum(lengths[order[start : start + batch_size]])
        stop = start + max(1, int(np.searchsorted(tokens, batch_tokens, side="right")))
        yield order[start:stop]
        start = stop
