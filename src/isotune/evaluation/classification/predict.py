"""A classifier's logits for every row: unpadded, on one process or many, independent of the batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from isotune.data.batch_schedule import ATTENTION_PARITY_TOKENS, Microbatch, collate
from isotune.data.classification.labels import labels_of
from isotune.data.contents import clean
from isotune.data.documents import Documents
from isotune.data.sources.source import surrogate_fault
from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier, load_run_classifier
from isotune.io.errors import UserError
from isotune.models.classifier import fast_evaluation

# tokens of one forward: more exceed a CPU's caches, and fewer leave a GPU idle
BATCH_TOKENS = {"cpu": 4_096, "cuda": 65_536}
SHOWN_CHARACTERS = 60


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
    """
    lengths, device = documents.lengths, classifier.device
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


def _batches(lengths: np.ndarray, batch_tokens: int, batch_size: int) -> Iterator[np.ndarray]:
    """Documents by length, the longest first, in batches; a document longer than `batch_tokens` is alone."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        tokens = np.cumsum(lengths[order[start : start + batch_size]])
        stop = start + max(1, int(np.searchsorted(tokens, batch_tokens, side="right")))
        yield order[start:stop]
        start = stop


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """Softmax in float64: [rows, classes]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def check_finite(logits: np.ndarray, ids: Sequence[Any], name: str) -> None:
    """UserError where some logits are NaN or Inf, with their number and the first id."""
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise UserError(
            f"{name} gives {len(broken)} of {len(logits)} rows a logit that is not finite, id {ids[broken[0]]!r} "
            "first: nothing was written"
        )


def show_sentences(run: Path, texts: Sequence[str], device: torch.device) -> None:
    """Classify texts with the model that a run saved, with the cleaning, truncation and class names of its recipe.

    A line of the printed table has the class of a text where the recipe's labels come from the text (`label_source:
    rules` or `random`), the predicted one, a mark where they differ, and the start of the text.
    """
    classifier = load_run_classifier(run, device, torch.float32)
    settings = classifier.settings
    for text in texts:
        if surrogate_fault(text):
            raise UserError(f"sentences: {text!r} is not UTF-8")
    cleaned = [clean(text) for text in texts] if settings.clean_text else list(texts)
    truth = None if settings.label_source == "column" else labels_of(texts, settings)
    documents = TextEncoder(classifier.tokenizer).encode(cleaned, settings.max_seq_length, settings.overlong, truth)
    probabilities = probabilities_of(classify(classifier, documents, Ranks(0, 1, classifier.device)))
    names = classifier.label_names or tuple(map(str, range(probabilities.shape[1])))
    actual = [None if truth is None else names[truth[row]] for row in range(len(texts))]
    predicted = [names[k] for k in probabilities.argmax(axis=1)]
    width = max(len(name or "") for name in [*actual, *predicted, "predicted"])
    print(f"  {'true':<{width}}  {'predicted':<{width}}  probability  text")
    for text, own, guess, row in zip(texts, actual, predicted, probabilities, strict=True):
        line = " ".join(text.split())
        shown = line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}..."
        mark = " " if own in (None, guess) else "x"
        print(f"{mark} {own or '?':<{width}}  {guess:<{width}}  {row.max():<11.3f}  {shown}")
