"""A classifier's logits for every row: unpadded, on one process or many, the same however the rows are batched."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from isotune.data.batch_schedule import ATTENTION_PARITY_TOKENS, Microbatch
from isotune.data.collate import collate
from isotune.data.documents import Documents
from isotune.evaluation.classification.models import Classifier
from isotune.evaluation.distributed_eval import Ranks
from isotune.io.errors import UserError
from isotune.models.classifier import fast_evaluation

# tokens of a forward pass: more only leave a CPU's caches, and fewer leave a GPU idle
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

    Documents lie end to end in passes of up to `batch_tokens` tokens and `batch_size` documents; none sees another, so
    the passes change a logit by no more than the rounding of its matrix products.

    Raises:
        RunFault: a row came from no process or from two.
    """
    device = next(classifier.model.parameters()).device
    lengths = documents.lengths
    limit = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    passes = list(_passes(lengths, limit, batch_size or len(documents)))
    costs = [float((lengths[p] * (1 + lengths[p] / ATTENTION_PARITY_TOKENS)).sum()) for p in passes]
    found: dict[int, np.ndarray] = {}
    mine = ranks.share(costs)
    bar = tqdm(total=sum(len(passes[i]) for i in mine), unit=" documents", disable=not progress)
    with bar, fast_evaluation(classifier.model):
        for number in mine:
            chosen = tuple(passes[number].tolist())
            tokens = int(lengths[passes[number]].sum())
            inputs: Any = collate(documents, Microbatch(number, chosen, tokens, len(chosen), costs[number]))
            del inputs["targets"]
            moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
            logits = classifier.model(**moved).logits.double().cpu().numpy()
            found.update(zip(chosen, logits, strict=True))
            bar.update(len(chosen))
    return np.stack(list(ranks.gather(found, count=len(documents)).values()))


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """Softmax in float64: [rows, classes]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def check_finite(logits: np.ndarray, ids: Sequence[Any], name: str) -> None:
    """Refuse predictions of a broken model.

    Raises:
        UserError: some are NaN or infinite: how many, and the id of the first.
    """
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise UserError(
            f"{name} gives {len(broken)} of {len(logits)} rows a logit that is not finite, id {ids[broken[0]]!r} "
            "first: nothing was written"
        )


def _passes(lengths: np.ndarray, batch_tokens: int, batch_size: int) -> Iterator[np.ndarray]:
    """Documents by length, the longest first, cut into passes; a document longer than a pass has one to itself."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        tokens = np.cumsum(lengths[order[start : start + batch_size]])
        stop = start + max(1, int(np.searchsorted(tokens, batch_tokens, side="right")))
        yield order[start:stop]
        start = stop
