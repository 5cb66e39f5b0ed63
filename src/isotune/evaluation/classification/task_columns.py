"""Which columns of other data a classifier is evaluated on, and whether they hold the classes.

A run's own columns are read where the data have them, as `isotune predict` does. A run whose classes came from rules,
or by chance, is scored by these on its own data alone: other data say their classes in a column.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from isotune.config.task_types import MULTI_LABEL
from isotune.evaluation.models import Classifier
from isotune.evaluation.tasks import ClassificationTask
from isotune.io.errors import UserError

COLUMN = "column"
TEXT, PAIR, LABEL = "dataset_text_field", "dataset_text_pair_field", "dataset_label_field"
USUAL = {TEXT: "text", LABEL: "label"}


def with_columns(task: ClassificationTask, classifier: Classifier) -> tuple[ClassificationTask, list[str]]:
    """The task with the columns that it leaves open, by the run and the first row of the data; lines that say so.

    UserError where the model reads pairs and the task names one text, or the data have no column of classes.
    """
    settings = classifier.settings
    source = task.rows()
    row = next(source.rows())
    found: dict[str, Any] = {}
    notes: list[str] = []
    if task.dataset_text_field is None and task.template is None:
        pair = settings.dataset_text_pair_field
        if pair is not None and task.dataset_text_pair_field is None:
            found |= {TEXT: settings.dataset_text_field, PAIR: pair}
        else:
            found[TEXT] = _column(TEXT, settings.dataset_text_field, row)
    elif settings.dataset_text_pair_field is not None and task.dataset_text_pair_field is None:
        if task.text_column != settings.dataset_text_field:
            raise UserError(
                f"{classifier.name} reads pairs of texts: say dataset_text_pair_field beside dataset_text_field"
            )
        found[PAIR] = settings.dataset_text_pair_field
    label_source = _label_source(task, classifier)
    if label_source == COLUMN and task.dataset_label_field is None:
        found[LABEL] = _column(LABEL, settings.dataset_label_field, row)
        in_columns = settings.task_type == MULTI_LABEL and any(name in row for name in settings.label_names or ())
        if settings.label_source != COLUMN and found[LABEL] not in row and not in_columns:
            raise UserError(
                f"{source.name} has no column {found[LABEL]!r} of classes, and {classifier.name} was trained on those "
                f"of label_source: {settings.label_source}: name the column by {LABEL}, or say that label_source again"
            )
    read = {key: found[key] for key in (TEXT, LABEL) if key in found}
    if any(column != USUAL[key] or getattr(settings, key) != column for key, column in read.items()):
        what = {TEXT: "the texts", LABEL: "the classes"}
        columns = " and ".join(f"{what[key]} from the column {column!r}" for key, column in read.items())
        notes.append(f"nobody said so: {columns} ({', '.join(read)} would say otherwise)")
    if label_source != settings.label_source:
        notes.append(
            f"label_source: {label_source}, by which these rows have their classes; {classifier.name} was trained on "
            f"those of label_source: {settings.label_source}"
        )
    elif label_source != COLUMN:
        notes.append(f"label_source: {label_source}, as in training: no column of classes is read")
    if label_source != COLUMN and task.dataset_label_field is None:
        found[LABEL] = settings.dataset_label_field  # is not read
    own_source: Any = None if label_source == settings.label_source else label_source
    return replace(task, **found, label_source=own_source), notes


def _column(key: str, of_run: str, row: Collection[str]) -> str:
    """The run's column where a row has it, else the usual one where it has that, else the run's, for the error."""
    return next((name for name in (of_run, USUAL[key]) if name in row), of_run)


def _label_source(task: ClassificationTask, classifier: Classifier) -> str:
    """Where the classes of a task's rows come from: the run's own source, or a column of other data."""
    of_run = classifier.settings.label_source
    if task.label_source is not None or of_run == COLUMN:
        return task.label_source or of_run
    recipe = classifier.run.settings if classifier.run is not None else {}
    own = {recipe.get("dataset_name"), recipe.get("eval_dataset_name")}
    is_own = task.dataset_mixture is not None or task.dataset_name in own
    return of_run if is_own and task.dataset_label_field is None and task.labels is None else COLUMN
