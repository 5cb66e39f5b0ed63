"""One evaluation of a classifier, from rows to files: predictions, metrics with intervals, examples.

Logits are computed unpadded, on one process or many, and do not depend on the batches.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from tqdm import tqdm

from isotune.config.recipes import AUTO
from isotune.data.batch_schedule import Microbatch, collate, microbatch_cost
from isotune.data.classification.classes import NameIndex, listed
from isotune.data.classification.labels import labels_of
from isotune.data.classification.preparation import LabelledSplit, tokenize
from isotune.data.classification.split import split_by_content
from isotune.data.contents import clean
from isotune.data.documents import Documents
from isotune.data.sources.source import surrogate_fault
from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.metrics.modules import class_columns, score_modules, split_metrics
from isotune.evaluation.models import Classifier, load_run_classifier
from isotune.evaluation.results import CLASSIFICATION, write_result
from isotune.evaluation.statistics.resampling import RESAMPLES, Scores, score, select_names
from isotune.evaluation.tasks import ClassificationTask
from isotune.io.errors import UserError
from isotune.io.files import replace_file
from isotune.models.classifier import fast_evaluation
from isotune.models.packed_attention import max_positions

# tokens of one forward: more exceed a CPU's caches, and fewer leave a GPU idle
BATCH_TOKENS = {"cpu": 4_096, "cuda": 65_536}
EXAMPLES = "examples.jsonl"
SHOWN, WRITTEN, LINE = 5, 100, 160
SHOWN_CHARACTERS = 60  # of a sentence


@dataclass(frozen=True)
class Rows:
    """The rows of an evaluation in the order of their ids; row i of each attribute is document i."""

    documents: Documents
    texts: list[str]
    names: list[str]  # of the classes
    truncated: int  # number of documents that were longer than max_seq_length
    fingerprint: str = ""  # of all that decides the documents
    left_out: dict[str, Any] = field(
        default_factory=dict[str, Any]
    )  # how many rows were read, and how many of them are not here, by reason
    named: bool = False  # whether the classes have names of their own, and not their numbers

    @property
    def metric_names(self) -> list[str] | None:
        """The names by which metrics of one class are called; None where its number is."""
        return self.names if self.named else None

    @property
    def ids(self) -> list[Any]:
        """The id of each row."""
        return self.documents.ids.tolist()

    @property
    def labels(self) -> np.ndarray:
        """int64 [rows]."""
        return self.documents.labels[:].astype(np.int64)

    def find(self, ids: Sequence[str]) -> list[int]:
        """The numbers of the rows of these ids; UserError where one is unknown."""
        row_of = {str(row_id): row for row, row_id in enumerate(self.ids)}
        unknown = [row_id for row_id in ids if row_id not in row_of]
        if unknown:
            raise UserError(f"--attention_ids: no row has the id {unknown[0]!r}")
        return [row_of[row_id] for row_id in ids]


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: probabilities, float64 [rows, classes], and their scores."""

    rows: Rows
    probabilities: np.ndarray
    scores: Scores

    @property
    def errors_first(self) -> np.ndarray:
        """Numbers of rows, int64: errors, the most confident first, then the others, the least confident first."""
        confidence = self.probabilities.max(axis=1)
        correct = self.probabilities.argmax(axis=1) == self.rows.labels
        return np.lexsort((np.where(correct, confidence, -confidence), correct))

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """The first WRITTEN rows in that order: id, names of label and predicted class, its probability, and text."""
        rows, ids, labels, predicted = self.rows, self.rows.ids, self.rows.labels, self.probabilities.argmax(axis=1)
        return [
            {
                "id": ids[row],
                "actual": rows.names[labels[row]],
                "predicted": rows.names[predicted[row]],
                "probability": float(self.probabilities[row, predicted[row]]),
                "text": rows.texts[row],
            }
            for row in self.errors_first[:WRITTEN].tolist()
        ]


def read_task_rows(
    task: ClassificationTask,
    classifier: Classifier,
    ranks: Ranks,
    limit: int | None = None,
    held_out: tuple[float, int] | None = None,
) -> Rows:
    """The first `limit` rows of a task, tokenised for the classifier; the main process shows progress and the table.

    With `held_out` (share and seed) they are only those that a run held out of its training data. UserError where there
    is no such data, a class is unknown, or max_seq_length is beyond the model's positions.
    """
    classes = classifier.num_labels
    if task.labels is not None and len(task.labels) != classes:
        raise UserError(f"the task has {len(task.labels)} labels, and {classifier.name} has {classes} classes")
    source, names = task.source(limit), classifier.label_names
    lists = source.class_names.get(task.dataset_label_field, ())
    if task.labels is not None and names and all(NameIndex(names).order_of(one) is None for one in lists):
        raise UserError(
            f"the task has the labels {listed(task.labels)}, and {classifier.name} has the classes {listed(names)}: "
            "give the labels the names of the model's classes, in the order of the numbers in the data"
        )
    own = {key: getattr(task, key) for key in ("dataset_text_field", "dataset_label_field")}
    own |= {"dataset_id_field": task.dataset_id_field or AUTO}
    own |= {key: value for key in ("max_seq_length", "overlong") if (value := getattr(task, key))}
    settings = replace(classifier.settings, **own)
    positions = max_positions(classifier.model.config)
    if positions is not None and settings.max_seq_length > positions:
        raise UserError(f"max_seq_length {settings.max_seq_length} is beyond the {positions} positions of the model")
    labelled: LabelledSplit = tokenize(source, classifier.tokenizer, settings, show_progress=ranks.is_main)
    rows_read, reasons = len(labelled.documents), {}
    if held_out is not None:
        _, labelled = split_by_content(labelled, *held_out)
        reasons = {"in the training side of the split": rows_read - len(labelled.documents)}
    if names is None and not labelled.numbered:
        raise UserError(
            f"{source.name} has the classes {listed(labelled.class_names or ())}, and {classifier.name} has {classes} "
            "without names: list them by `labels` in a task file, in the order of the model's outputs"
        )
    labelled.check_classes(evaluation=True)
    if ranks.is_main:
        print(labelled.prepared().table, flush=True)
    order = np.argsort(labelled.documents.ids, kind="stable")
    texts = list(labelled.texts())
    return Rows(
        documents=labelled.documents.select(order),
        texts=[texts[i] for i in order.tolist()],
        names=list(labelled.class_names or map(str, range(classes))),
        named=labelled.class_names is not None,
        truncated=int((labelled.documents.columns["whole_lengths"] > settings.max_seq_length).sum()),
        fingerprint=labelled.fingerprint,
        left_out={"rows_read": rows_read, "reasons": reasons},
    )


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
    """The logits of every document, float64 [documents, classes], the same on every rank; UserError for NaN or Inf.

    Documents are packed without padding into batches of up to `batch_tokens` tokens and `batch_size` documents; none
    attends to another, so the batches change a logit by no more than the rounding of its matrix products.
    """
    lengths, device = documents.lengths, classifier.device
    limit = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    batches = list(_batches(lengths, limit, batch_size or len(documents)))
    costs = [microbatch_cost(lengths[rows]) for rows in batches]
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
            logits_of.update(zip(rows, classifier.model(**moved).logits.cpu().double().numpy(), strict=True))
            bar.update(len(rows))
    logits = np.stack(list(ranks.gather(logits_of, count=len(documents)).values()))
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        first = documents.columns.get("ids", documents.source_rows)[broken].tolist()[0]
        what = f"gives {len(broken)} of {len(logits)} rows a logit that is not finite"
        raise UserError(f"{classifier.name} {what}, id {first!r} first: nothing was written")
    return logits


def _batches(lengths: np.ndarray, batch_tokens: int, batch_size: int) -> Iterator[np.ndarray]:
    """Documents by length, the longest first, in batches; a document longer than `batch_tokens` is alone."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        tokens = np.cumsum(lengths[order[start : start + batch_size]])
        stop = start + max(1, int(np.searchsorted(tokens, batch_tokens, side="right")))
        yield order[start:stop]
        start = stop


def evaluate_rows(
    classifier: Classifier,
    rows: Rows,
    task: ClassificationTask,
    ranks: Ranks,
    *,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation | None:
    """Classify every row on all ranks, and score on the main one; None on the others.

    UserError where the task names a metric that these classes do not have, or a module cannot be computed.
    """
    names, modules = split_metrics(task.metrics)
    uniform = np.full((1, classifier.num_labels), 1 / classifier.num_labels)
    one_row = classification_statistics(np.zeros(1, np.int64), uniform, ordinal=task.ordinal, names=rows.metric_names)
    select_names(one_row, names)  # refuses a wrong name before the forwards
    logits = classify(
        classifier, rows.documents, ranks, batch_tokens=batch_tokens, batch_size=batch_size, progress=ranks.is_main
    )
    if not ranks.is_main:
        return None
    labels, probabilities, scores = rows.labels, softmax(logits, axis=1), Scores({}, {})
    if names or not modules:
        statistics = classification_statistics(labels, probabilities, ordinal=task.ordinal, names=rows.metric_names)
        scores = score(statistics, len(labels), only=names, resamples=resamples, seed=seed)
    columns = class_columns(labels, probabilities)
    scores |= score_modules(modules, columns, len(labels), resamples=resamples, seed=seed)
    return Evaluation(rows, probabilities, scores)


def write_evaluation(
    evaluation: Evaluation, folder: Path, classifier: Classifier, task: ClassificationTask, settings: dict[str, Any]
) -> None:
    """examples.jsonl, predictions.jsonl and metrics.json in `folder`; `settings` are recorded among the facts."""
    rows, scores, probabilities = evaluation.rows, evaluation.scores, evaluation.probabilities
    columns = (rows.ids, rows.labels.tolist(), probabilities.argmax(axis=1).tolist(), probabilities.tolist())
    keys = ("id", "label", "prediction", "probabilities")
    predictions: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
    if rows.named:
        for line in predictions:
            line |= {f"{key}_name": rows.names[line[key]] for key in ("label", "prediction")}
    facts = {
        "kind": CLASSIFICATION,
        "model": classifier.name,
        "dataset_name": task.dataset_name,
        "dataset_split": task.dataset_split,
        "label_names": rows.names,
        "ordinal": task.ordinal,
        "undefined": scores.undefined,
        "left_out": rows.left_out,
        "settings": {**settings, "rows_cut": rows.truncated},
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / EXAMPLES, "".join(json.dumps(example) + "\n" for example in evaluation.examples))
    write_result(folder, facts, scores, predictions, rows.texts)


def print_examples(evaluation: Evaluation) -> None:
    """The first SHOWN examples, each on two lines."""
    for example in evaluation.examples[:SHOWN]:
        text = " ".join(example["text"].split())
        mark = "=" if example["actual"] == example["predicted"] else "x"
        print(f"  {mark} id {example['id']}: actual {example['actual']}, predicted {example['predicted']} ", end="")
        print(f"({example['probability']:.1%})\n      {text[: LINE - 1] + '…' if len(text) > LINE else text}")


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
    probabilities = softmax(classify(classifier, documents, Ranks(0, 1, classifier.device)), axis=1)
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
