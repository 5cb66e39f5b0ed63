"""One evaluation of a classifier, from rows to files: predictions, metrics with intervals, pictures, examples."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isotune.data.classification.preparation import LabelledSplit, tokenize
from isotune.data.classification.split import split_by_content
from isotune.data.documents import Documents
from isotune.data.sources.source import Source
from isotune.evaluation.classification.examples import Example, examples_of, worth_reading
from isotune.evaluation.classification.models import Classifier, positions_of
from isotune.evaluation.classification.prediction import check_finite, classify, probabilities_of
from isotune.evaluation.classification.tasks import Task
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.metrics.classification_metrics import Scores, chosen_names, classification_statistics, score
from isotune.evaluation.results import CLASSIFICATION, rows_digest, write_result
from isotune.evaluation.statistics.resampling import RESAMPLES
from isotune.io.errors import UserError


@dataclass(frozen=True)
class Rows:
    """What is classified, in the order of the ids: row i of everything is document i.

    Attributes:
        documents: as the model reads them.
        texts: as they stand in the source.
        names: of the classes.
        cut: documents that were longer than max_seq_length.
    """

    documents: Documents
    texts: list[str]
    names: list[str]
    cut: int

    @property
    def ids(self) -> list[Any]:
        """Of the rows."""
        return self.documents.ids.tolist()

    @property
    def labels(self) -> np.ndarray:
        """int64 [rows]."""
        return self.documents.labels[:].astype(np.int64)


@dataclass(frozen=True)
class Evaluation:
    """What came of it: float64 [rows, classes] probabilities, and their scores."""

    rows: Rows
    probabilities: np.ndarray
    scores: Scores

    @property
    def examples(self) -> list[Example]:
        """Every row, the most confident errors first."""
        rows = self.rows
        order = worth_reading(rows.labels, self.probabilities)
        return examples_of(order, rows.ids, rows.labels, self.probabilities, rows.texts, rows.names)


def read_task_rows(
    task: Task,
    classifier: Classifier,
    ranks: Ranks,
    limit: int | None = None,
    held_out: tuple[float, int] | None = None,
) -> Rows:
    """The rows of a task as the classifier reads them; the main process shows progress and the table.

    Args:
        limit: the first so many.
        held_out: share and seed: only what a run kept for evaluation of its training data.

    Raises:
        UserError: no such data, a class that the classifier does not know, or a max_seq_length beyond its positions.
    """
    classes = classifier.num_labels
    if task.labels is not None and len(task.labels) != classes:
        raise UserError(f"the task has {len(task.labels)} labels, and {classifier.name} has {classes} classes")
    said = {
        "dataset_text_field": task.dataset_text_field,
        "dataset_label_field": task.dataset_label_field,
        "dataset_id_field": task.dataset_id_field,
        **({"max_seq_length": task.max_seq_length} if task.max_seq_length else {}),
        **({"overlong": task.overlong} if task.overlong else {}),
    }
    settings = replace(classifier.settings, **said)
    positions = positions_of(classifier.model.config)
    if settings.max_seq_length > positions:
        raise UserError(f"max_seq_length {settings.max_seq_length} is beyond the {positions} positions of the model")
    source: Source = task.source(limit)
    found: LabelledSplit = tokenize(source, classifier.tokenizer, settings, show_progress=ranks.is_main)
    if held_out is not None:
        _, found = split_by_content(found, *held_out)
    found.check_classes(evaluation=True)
    if ranks.is_main:
        print(found.prepared().table, flush=True)
    names = [str(name) for name in task.labels or classifier.label_names or range(classes)]
    order = np.argsort(found.documents.ids, kind="stable")
    texts = list(found.texts())
    return Rows(
        documents=found.documents.select(order),
        texts=[texts[i] for i in order.tolist()],
        names=names,
        cut=int((found.documents.columns["whole_lengths"] > settings.max_seq_length).sum()),
    )


def evaluate_rows(
    classifier: Classifier,
    rows: Rows,
    task: Task,
    ranks: Ranks,
    *,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluation | None:
    """Classify every row on all ranks, and score on the main one; None on the others.

    Raises:
        UserError: a logit is not finite, or the task names a metric that there is not.
    """
    one_row = classification_statistics(
        np.zeros(1, np.int64), np.full((1, classifier.num_labels), 1 / classifier.num_labels), ordinal=task.ordinal
    )
    chosen_names(one_row, task.metrics)  # a misspelled metric is named before the model has read anything
    logits = classify(
        classifier, rows.documents, ranks, batch_tokens=batch_tokens, batch_size=batch_size, progress=ranks.is_main
    )
    check_finite(logits, rows.ids, classifier.name)
    if not ranks.is_main:
        return None
    probabilities = probabilities_of(logits)
    statistics = classification_statistics(rows.labels, probabilities, ordinal=task.ordinal)
    scores = score(statistics, len(rows.labels), only=task.metrics, resamples=resamples, seed=seed)
    return Evaluation(rows, probabilities, scores)


def write_evaluation(
    done: Evaluation, folder: Path, classifier: Classifier, task: Task, settings: dict[str, Any]
) -> None:
    """metrics.json and predictions.jsonl in `folder`; `settings` are noted beside the facts."""
    rows = done.rows
    ids, labels, chosen = rows.ids, rows.labels.tolist(), done.probabilities.argmax(axis=1).tolist()
    facts = {
        "kind": CLASSIFICATION,
        "model": classifier.name,
        "dataset_name": task.dataset_name,
        "dataset_split": task.dataset_split,
        "rows": len(ids),
        "rows_sha256": rows_digest(zip(ids, rows.texts, strict=True)),
        "label_names": rows.names,
        "ordinal": task.ordinal,
        "undefined": done.scores.undefined,
        "settings": {**settings, "rows_cut": rows.cut},
    }
    predictions = [
        {"id": ids[r], "label": labels[r], "prediction": chosen[r], "probabilities": done.probabilities[r].tolist()}
        for r in range(len(ids))
    ]
    write_result(folder, facts, done.scores.metrics, done.scores.intervals, predictions)


def print_scores(done: Evaluation) -> None:
    """Every metric with its interval."""
    print(f"  {'metric':<28} {'value':>8}   95% interval")
    for name, value in done.scores.metrics.items():
        low, high = done.scores.intervals[name]
        print(f"  {name:<28} {value:>8.4f}   {low:.4f} to {high:.4f}")
    for name in done.scores.undefined:
        print(f"  {name:<28}   these rows have none")
