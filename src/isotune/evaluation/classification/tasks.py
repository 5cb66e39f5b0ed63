"""What a classifier is evaluated on, as a small YAML file.

dataset_name: stanfordnlp/imdb        a Hub id, folder, file or builtin:NAME, as in a recipe
dataset_split: test
template: "{title}. {text}"           the text that the model reads, from the row's columns; else one column
dataset_text_field: text
dataset_label_field: label
dataset_id_field: null                the column that names a row; `id` where there is one, else row numbers
labels: [negative, positive]          the classes in their order; a row may hold the name or the number
ordinal: false                        the classes are ordered: metrics of distance are computed too
metrics: [accuracy, f1, log_loss]     all built-in ones where left out; modules of `evaluate` too (metrics.modules)
max_seq_length, overlong              as in a recipe; the run's own where left out
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from isotune.data.documents import digest
from isotune.data.sources.source import Row, Source, read_rows
from isotune.evaluation.metrics.classification import METRICS, is_classification_metric
from isotune.evaluation.metrics.modules import CLASSES
from isotune.evaluation.tasks import Task, fill_template
from isotune.io.errors import UserError

# the keys that are flags of the command line too
FLAGS = (
    "dataset_name",
    "dataset_split",
    "dataset_text_field",
    "dataset_label_field",
    "ordinal",
    "max_seq_length",
)


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task):
    """Rows to classify and the metrics; the head of this module explains each field."""

    BUILTIN_METRICS = METRICS
    COLUMNS = CLASSES

    template: str | None = None
    dataset_text_field: str = "text"
    dataset_label_field: str = "label"
    dataset_id_field: str | None = None
    labels: tuple[str | int, ...] | None = None
    ordinal: bool = False
    max_seq_length: int | None = None
    overlong: str | None = None

    @classmethod
    def is_builtin_metric(cls, name: str) -> bool:
        """Whether `metrics` may name it without a module; f1_class_0 and its like too."""
        return is_classification_metric(name)

    @property
    def name(self) -> str:
        """The name of the result's folder: the data set's own, with the split."""
        stem = Path(self.dataset_name.removeprefix("builtin:").rstrip("/")).stem
        return stem if stem == self.dataset_split else f"{stem}-{self.dataset_split}"

    def source(self, limit: int | None = None) -> Source:
        """The first `limit` rows, with the template and the names of the classes applied.

        Raises:
            UserError: no such data; while reading, a row without a column of the template or of an unknown class.
        """
        plain = read_rows(self.dataset_name, self.dataset_split)
        if self.template is None and self.labels is None and limit is None:
            return plain
        fingerprint = digest("task", plain.fingerprint, self.template, self.labels, limit)
        return replace(plain, fingerprint=fingerprint, read=lambda: self._rows(plain, limit))

    def _rows(self, plain: Source, limit: int | None) -> Iterator[Row]:
        for number, row in enumerate(islice(plain.rows(), limit)):
            made = dict(row)
            if self.template is not None:
                made[self.dataset_text_field] = fill_template(self.template, row, plain, number)
            if self.labels is not None and self.dataset_label_field in row:
                made[self.dataset_label_field] = self._class_number(row[self.dataset_label_field], plain, number)
            yield made

    def _class_number(self, label: Any, plain: Source, number: int) -> Any:
        labels = self.labels or ()
        if label in labels and not isinstance(label, bool):
            return labels.index(label)
        if isinstance(label, int) and all(isinstance(name, str) for name in labels) and 0 <= label < len(labels):
            return label
        known = ", ".join(str(name) for name in labels)
        raise UserError(f"{plain.where(number)} is of class {str(label)[:40]!r}, and the task knows {known}")
