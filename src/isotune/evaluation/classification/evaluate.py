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
from scipy.special import expit, softmax
from tqdm import tqdm

from isotune.config.recipes import AUTO
from isotune.config.task_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from isotune.data.batch_schedule import collate, microbatch_cost
from isotune.data.class_index import NameIndex, listed
from isotune.data.classification.predictions import prediction_lines
from isotune.data.classification.preparation import LabelledSplit, tokenize
from isotune.data.classification.split import split_by_content
from isotune.data.classification.thresholds import THRESHOLD, Thresholds, thresholds_of
from isotune.data.documents import Documents
from isotune.evaluation.classification.examples import EXAMPLES, WRITTEN, errors_first, examples_of
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.metrics.modules import score_modules, split_metrics
from isotune.evaluation.metrics.of_type import check_modules, columns_of, statistics_of
from isotune.evaluation.models import Classifier
from isotune.evaluation.results import CLASSIFICATION, write_result
from isotune.evaluation.statistics.resampling import RESAMPLES, Scores, score, select_names
from isotune.evaluation.tasks import ClassificationTask
from isotune.io.errors import UserError
from isotune.io.files import replace_file
from isotune.models.classifier import fast_evaluation
from isotune.models.layouts.fitting import FittingBatches, memory_in_one_sentence
from isotune.models.packed_attention import max_positions

# tokens of one forward: more exceed a CPU's caches, and fewer leave a GPU idle
BATCH_TOKENS = {"cpu": 4_096, "cuda": 65_536}
REMEDY = "a smaller max_seq_length or 16-bit weights take less"


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
    task_type: str = SINGLE_LABEL
    thresholds: Thresholds = THRESHOLD  # from which a row has a label, of multi_label
    notes: tuple[str, ...] = ()  # what reading guessed, or passed over

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
        """Classes int64 [rows], labels int64 [rows, labels], or numbers float64 [rows]."""
        labels = np.asarray(self.documents.labels)
        return labels if self.task_type == REGRESSION else labels.astype(np.int64)

    def find(self, ids: Sequence[str]) -> list[int]:
        """The numbers of the rows of these ids; UserError where one is unknown."""
        row_of = {str(row_id): row for row, row_id in enumerate(self.ids)}
        unknown = [row_id for row_id in ids if row_id not in row_of]
        if unknown:
            raise UserError(f"--attention_ids: no row has the id {unknown[0]!r}")
        return [row_of[row_id] for row_id in ids]


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: what was predicted, and its scores."""

    rows: Rows
    outputs: np.ndarray  # probabilities, float64 [rows, classes or labels]; the numbers [rows] of a regression
    scores: Scores

    @property
    def task_type(self) -> str:
        """What kind of labels were predicted."""
        return self.rows.task_type

    @cached_property
    def errors_first(self) -> np.ndarray:
        """Numbers of rows, int64, those that are most wrong first."""
        return errors_first(self.task_type, self.rows.labels, self.outputs, self.rows.thresholds)

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """The first WRITTEN rows in that order."""
        return self.examples_of(self.errors_first[:WRITTEN].tolist())

    def examples_of(self, chosen: Sequence[int]) -> list[dict[str, Any]]:
        """These rows with what they are, what was predicted, and their texts."""
        rows = self.rows
        return examples_of(
            self.task_type, chosen, rows.ids, rows.labels, self.outputs, rows.names, rows.texts, rows.thresholds
        )


def read_task_rows(
    task: ClassificationTask,
    classifier: Classifier,
    ranks: Ranks,
    limit: int | None = None,
    held_out: tuple[float, int] | None = None,
    notes: Sequence[str] = (),
) -> Rows:
    """The first `limit` rows of a task, tokenised for the classifier; the main process shows progress and the table.

    With `held_out` (share and seed) they are only those that a run held out of its training data. `notes` say what was
    guessed of the task, and are printed with what reading notes. UserError where there
    is no such data, a class is unknown, or max_seq_length is beyond the model's positions.
    """
    classes, is_single = classifier.num_labels, classifier.task_type == SINGLE_LABEL
    for key, given in (("labels", task.labels), ("ordinal", task.ordinal)):
        if given and not is_single:
            raise UserError(f"{key} is of single_label, and {classifier.name} is of {classifier.task_type}")
    if task.label_thresholds and classifier.task_type != MULTI_LABEL:
        raise UserError(f"label_thresholds is of multi_label, and {classifier.name} is of {classifier.task_type}")
    if task.labels is not None and len(task.labels) != classes:
        raise UserError(f"the task has {len(task.labels)} labels, and {classifier.name} has {classes} classes")
    source, names = task.source(limit), classifier.label_names
    lists = source.class_names.get(task.label_column, ())
    if task.labels is not None and names and all(NameIndex(names).order_of(one) is None for one in lists):
        raise UserError(
            f"the task has the labels {listed(task.labels)}, and {classifier.name} has the classes {listed(names)}: "
            "give the labels the names of the model's classes, in the order of the numbers in the data"
        )
    own: dict[str, Any] = {"dataset_text_field": task.text_column, "dataset_label_field": task.label_column}
    own |= {"dataset_text_pair_field": task.dataset_text_pair_field}
    if classifier.settings.dataset_text_pair_field is not None and task.dataset_text_pair_field is None:
        own |= {key: getattr(classifier.settings, key) for key in ("dataset_text_field", "dataset_text_pair_field")}
    own |= {"dataset_id_field": task.dataset_id_field or AUTO}
    own |= {key: value for key in ("max_seq_length", "overlong", "label_source") if (value := getattr(task, key))}
    settings = replace(classifier.settings, **own)
    positions = max_positions(classifier.model.config)
    if positions is not None and settings.max_seq_length > positions:
        raise UserError(f"max_seq_length {settings.max_seq_length} is beyond the {positions} positions of the model")
    if held_out is not None and limit is not None and settings.label_source == "rules":
        raise UserError(
            "--limit has no sure meaning here: where rules give the classes, which rows a run held out of training "
            "depends on all of them; --dataset_name evaluates on the first rows of other data"
        )
    labelled: LabelledSplit = tokenize(source, classifier.tokenizer, settings, show_progress=ranks.is_main)
    rows_read, reasons = len(labelled.documents), {}
    if held_out is not None:
        _, labelled = split_by_content(labelled, *held_out)
        reasons = {"in the training side of the split": rows_read - len(labelled.documents)}
    if names is None and not labelled.numbered and labelled.class_names is not None:
        raise UserError(
            f"{source.name} has the classes {listed(labelled.class_names)}, and {classifier.name} has {classes} "
            "without names: list them by `labels` in a task file, in the order of the model's outputs"
        )
    if names is not None and task.labels is None and labelled.by_place:
        notes = (*notes, f"numbers are taken for the places of {listed(names)} (labels in a task file name others)")
    labelled.check_classes(evaluation=True)
    labelled = replace(labelled, notes=(*notes, *labelled.notes))
    if ranks.is_main:
        print(labelled.prepared().table, flush=True)
    order = np.argsort(labelled.documents.ids, kind="stable")
    texts = list(labelled.texts())
    return Rows(
        documents=labelled.documents.select(order),
        texts=[texts[i] for i in order.tolist()],
        names=[] if classifier.task_type == REGRESSION else list(labelled.class_names or map(str, range(classes))),
        named=labelled.class_names is not None,
        truncated=int((labelled.documents.columns["whole_lengths"] > settings.max_seq_length).sum()),
        fingerprint=labelled.fingerprint,
        left_out={"rows_read": rows_read, "reasons": reasons},
        task_type=classifier.task_type,
        thresholds=thresholds_of(task.label_thresholds, classes) if task.label_thresholds else classifier.thresholds,
        notes=labelled.notes,
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
    fitting: FittingBatches | None = None,
) -> np.ndarray:
    """The logits of every document, float64 [documents, classes], the same on every rank; UserError for NaN or Inf.

    Documents are packed without padding into batches of up to `batch_tokens` tokens and `batch_size` documents; none
    attends to another, so the batches change a logit by no more than the rounding of its matrix products. `fitting`
    remembers between calls which batches the device has memory for.
    """
    lengths, device = documents.lengths, classifier.device
    limit = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    batches = list(_batches(lengths, limit, batch_size or len(documents)))
    costs = [microbatch_cost(lengths[rows]) for rows in batches]
    logits_of: dict[int, np.ndarray] = {}

    def tokens(rows: Sequence[int]) -> int:
        return int(lengths[list(rows)].sum())

    def forward(rows: Sequence[int]) -> np.ndarray:
        inputs: Any = collate(documents, rows)
        del inputs["targets"]
        moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        return classifier.model(**moved).logits.cpu().double().numpy()

    own, fitting = ranks.share(costs), fitting or FittingBatches()
    bar = tqdm(total=sum(len(batches[number]) for number in own), unit=" documents", disable=not progress)
    with bar, fast_evaluation(classifier.model), memory_in_one_sentence(fitting, REMEDY):
        for place, number in enumerate(own, start=1):
            ranks.watchdog.progress(f"batch {place} of its {len(own)}")
            for rows, logits in fitting.run(batches[number].tolist(), tokens, forward):
                logits_of.update(zip(rows, logits, strict=True))
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
    task_type, labels = rows.task_type, rows.labels
    options: Any = {"ordinal": task.ordinal, "names": rows.metric_names, "thresholds": rows.thresholds}
    none = outputs_of(task_type, np.zeros((1, classifier.num_labels)))
    of_one_row = statistics_of(task_type, labels[:1], none, **options)
    select_names(of_one_row, names)  # refuses a wrong name before the forwards
    check_modules(modules, task_type, columns_of(task_type, labels[:1], none))
    logits = classify(
        classifier, rows.documents, ranks, batch_tokens=batch_tokens, batch_size=batch_size, progress=ranks.is_main
    )
    if not ranks.is_main:
        return None
    outputs, scores = outputs_of(task_type, logits), Scores({}, {})
    if names or not modules:
        statistics = statistics_of(task_type, labels, outputs, **options)
        scores = score(statistics, len(labels), only=names, resamples=resamples, seed=seed)
    columns = columns_of(task_type, labels, outputs, rows.thresholds)
    scores |= score_modules(modules, columns, len(labels), resamples=resamples, seed=seed)
    return Evaluation(rows, outputs, scores)


def outputs_of(task_type: str, logits: np.ndarray) -> np.ndarray:
    """What logits [rows, outputs] say: probabilities, or the numbers [rows] of a regression."""
    if task_type == REGRESSION:
        return logits[:, 0]
    return expit(logits) if task_type == MULTI_LABEL else softmax(logits, axis=1)


def write_evaluation(
    evaluation: Evaluation, folder: Path, classifier: Classifier, task: ClassificationTask, settings: dict[str, Any]
) -> None:
    """examples.jsonl, predictions.jsonl and metrics.json in `folder`; `settings` are recorded among the facts."""
    rows, scores = evaluation.rows, evaluation.scores
    names = rows.names if rows.named else None
    predictions = prediction_lines(rows.task_type, rows.ids, rows.labels, evaluation.outputs, names, rows.thresholds)
    if (groups := rows.documents.columns.get("group")) is not None:
        predictions = [{**line, "group": own} for line, own in zip(predictions, groups.tolist(), strict=True)]
    facts = {
        "kind": CLASSIFICATION,
        "model": classifier.name,
        "dataset_name": task.dataset_name,
        "dataset_split": task.dataset_split,
        "task_type": rows.task_type,
        "label_names": rows.names,
        "ordinal": task.ordinal,
        **({"label_thresholds": np.atleast_1d(rows.thresholds).tolist()} if rows.task_type == MULTI_LABEL else {}),
        "left_out": rows.left_out,
        **({"notes": list(rows.notes)} if rows.notes else {}),
        "settings": {**settings, "rows_cut": rows.truncated},
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / EXAMPLES, "".join(json.dumps(example) + "\n" for example in evaluation.examples))
    write_result(folder, facts, scores, predictions, rows.texts)
