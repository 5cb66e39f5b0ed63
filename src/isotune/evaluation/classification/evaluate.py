"""One evaluation of a classifier, from rows to files: predictions, metrics with intervals, examples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isotune.data.classification.preparation import LabelledSplit, tokenize
from isotune.data.classification.split import split_by_content
from isotune.data.documents import Documents
from isotune.evaluation.classification.predict import check_finite, classify, probabilities_of
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.metrics.classification import classification_statistics
from isotune.evaluation.metrics.modules import class_columns, score_modules, split_metrics
from isotune.evaluation.models import Classifier
from isotune.evaluation.results import CLASSIFICATION, write_result
from isotune.evaluation.statistics.resampling import RESAMPLES, Scores, score, select_names
from isotune.evaluation.tasks import ClassificationTask
from isotune.io.errors import UserError
from isotune.io.files import replace_file
from isotune.models.packed_attention import max_positions

EXAMPLES = "examples.jsonl"
SHOWN, WRITTEN, LINE = 5, 100, 160


@dataclass(frozen=True)
class Rows:
    """The rows of an evaluation in the order of their ids; row i of each attribute is document i.

    `names` are those of the classes, `truncated` the number of documents that were longer than max_seq_length.
    """

    documents: Documents
    texts: list[str]
    names: list[str]
    truncated: int

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

    @property
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
    """The rows of a task, tokenised for the classifier; the main process shows progress and the table.

    Args:
        limit: number of rows, the first ones.
        held_out: share and seed: only the rows that a run held out of its training data.

    Raises:
        UserError: no such data, an unknown class, or a max_seq_length beyond the model's positions.
    """
    classes = classifier.num_labels
    if task.labels is not None and len(task.labels) != classes:
        raise UserError(f"the task has {len(task.labels)} labels, and {classifier.name} has {classes} classes")
    own = {key: getattr(task, key) for key in ("dataset_text_field", "dataset_label_field", "dataset_id_field")}
    own |= {key: value for key in ("max_seq_length", "overlong") if (value := getattr(task, key))}
    settings = replace(classifier.settings, **own)
    positions = max_positions(classifier.model.config)
    if positions is not None and settings.max_seq_length > positions:
        raise UserError(f"max_seq_length {settings.max_seq_length} is beyond the {positions} positions of the model")
    labelled: LabelledSplit = tokenize(task.source(limit), classifier.tokenizer, settings, show_progress=ranks.is_main)
    if held_out is not None:
        _, labelled = split_by_content(labelled, *held_out)
    labelled.check_classes(evaluation=True)
    if ranks.is_main:
        print(labelled.prepared().table, flush=True)
    order = np.argsort(labelled.documents.ids, kind="stable")
    texts = list(labelled.texts())
    return Rows(
        documents=labelled.documents.select(order),
        texts=[texts[i] for i in order.tolist()],
        names=[str(name) for name in task.labels or classifier.label_names or range(classes)],
        truncated=int((labelled.documents.columns["whole_lengths"] > settings.max_seq_length).sum()),
    )


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

    Raises:
        UserError: a logit is not finite, the task names a metric that these classes do not have, or a module cannot be
            computed.
    """
    names, modules = split_metrics(task.metrics)
    uniform = np.full((1, classifier.num_labels), 1 / classifier.num_labels)
    one_row = classification_statistics(np.zeros(1, np.int64), uniform, ordinal=task.ordinal)
    select_names(one_row, names)  # refuses a wrong name before the forwards
    logits = classify(
        classifier, rows.documents, ranks, batch_tokens=batch_tokens, batch_size=batch_size, progress=ranks.is_main
    )
    check_finite(logits, rows.ids, classifier.name)
    if not ranks.is_main:
        return None
    labels, probabilities, scores = rows.labels, probabilities_of(logits), Scores({}, {})
    if names or not modules:
        statistics = classification_statistics(labels, probabilities, ordinal=task.ordinal)
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
    facts = {
        "kind": CLASSIFICATION,
        "model": classifier.name,
        "dataset_name": task.dataset_name,
        "dataset_split": task.dataset_split,
        "label_names": rows.names,
        "ordinal": task.ordinal,
        "undefined": scores.undefined,
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
