"""What is evaluated on, as a small YAML file, so that a data set is added without a line of code.

    dataset_name: stanfordnlp/imdb        a Hub id, folder, file or builtin:NAME, as in a recipe
    dataset_split: test
    template: "{title}. {text}"           the text that the model reads, from the row's columns; else one column
    dataset_text_field: text
    dataset_label_field: label
    dataset_id_field: null                the column that names a row; `id` where there is one, else row numbers
    labels: [negative, positive]          the classes in their order; a row may say the name or the number
    ordinal: false                        the order of the classes means something: how far off is measured too
    metrics: [accuracy, f1, log_loss]     all where left out
    max_seq_length, overlong              as in a recipe; the run's own where left out

A command line's flags win over the file.
"""

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from isotune.data.fingerprint import digest
from isotune.data.sources.hub import first_line
from isotune.data.sources.source import Row, Source, read_rows
from isotune.io.errors import UserError
from isotune.io.near_names import did_you_mean

# what a command line may say of a task
FLAGS = (
    "dataset_name",
    "dataset_split",
    "dataset_text_field",
    "dataset_label_field",
    "ordinal",
    "max_seq_length",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to classify and what to measure; the head of this module says what each field means."""

    dataset_name: str
    dataset_split: str = "test"
    template: str | None = None
    dataset_text_field: str = "text"
    dataset_label_field: str = "label"
    dataset_id_field: str | None = None
    labels: tuple[str | int, ...] | None = None
    ordinal: bool = False
    metrics: tuple[str, ...] = ()
    max_seq_length: int | None = None
    overlong: str | None = None

    @property
    def name(self) -> str:
        """A name for the folder of the result: the data set's own, with the split."""
        stem = Path(self.dataset_name.removeprefix("builtin:").rstrip("/")).stem
        return stem if stem == self.dataset_split else f"{stem}-{self.dataset_split}"

    def source(self, limit: int | None = None) -> Source:
        """The rows, with the template and the names of the classes applied, the first `limit` of them.

        Raises:
            UserError: no such data; while reading, a row without a column of the template or with an unknown class.
        """
        plain = read_rows(self.dataset_name, self.dataset_split)
        if self.template is None and self.labels is None and limit is None:
            return plain
        fingerprint = digest("task", plain.fingerprint, self.template, self.labels, limit)
        return replace(plain, fingerprint=fingerprint, read=lambda: self._rows(plain, limit))

    def _rows(self, plain: Source, limit: int | None) -> Iterator[Row]:
        columns = template_columns(self.template) if self.template is not None else []
        for number, row in enumerate(islice(plain.rows(), limit)):
            made = dict(row)
            if self.template is not None:
                for column in columns:
                    if column not in row:
                        held = ", ".join(row)
                        raise UserError(
                            f"{plain.where(number)} lacks the column {column!r} of the template; it has {held}"
                        )
                made[self.dataset_text_field] = self.template.format_map(row)
            if self.labels is not None and self.dataset_label_field in row:
                made[self.dataset_label_field] = self._class_of(row[self.dataset_label_field], plain, number)
            yield made

    def _class_of(self, said: Any, plain: Source, number: int) -> Any:
        labels = self.labels or ()
        if said in labels and not isinstance(said, bool):
            return labels.index(said)
        if isinstance(said, int) and all(isinstance(label, str) for label in labels) and 0 <= said < len(labels):
            return said
        known = ", ".join(str(label) for label in labels)
        raise UserError(f"{plain.where(number)} is of class {str(said)[:40]!r}, and the task knows {known}")


def read_task(file: str | Path | None, given: Mapping[str, Any]) -> Task:
    """The task of a file and of flags, of which those that are not None win.

    Raises:
        UserError: no such file, no YAML, a key that there is not or of another kind, or nothing to evaluate on.
    """
    written = read_task_file(Path(file)) if file is not None else {}
    known = {field.name: field for field in fields(Task)}
    for key, value in written.items():
        if key not in known:
            raise UserError(f"{file}: there is no key {key!r}{did_you_mean(key, known)}")
        _check(key, value, f"{file}: {key}")
    values = {**written, **{key: value for key, value in given.items() if value is not None}}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if not values.get("dataset_name"):
        raise UserError("there is nothing to evaluate on: say --dataset_name or --task")
    if values.get("template") is not None:
        template_columns(values["template"])
    return Task(**values)


def read_task_file(file: Path) -> dict[str, Any]:
    """The keys of a task's file, whatever the task is.

    Raises:
        UserError: no such file, no YAML, or no keys.
    """
    try:
        written = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the task file {file} cannot be read: {first_line(error)}") from error
    if not isinstance(written, dict):
        raise UserError(f"the task file {file} holds no keys")
    return written


def _check(key: str, value: Any, where: str) -> None:
    lists = {"labels": (str, int), "metrics": (str,)}
    if key in lists:
        fits = (
            isinstance(value, list) and all(type(one) in lists[key] for one in value) and len(set(value)) == len(value)
        )
        kind = "a list without doubles"
    elif key == "ordinal":
        fits, kind = isinstance(value, bool), "true or false"
    elif key == "max_seq_length":
        fits, kind = type(value) is int, "a whole number"
    else:
        fits, kind = isinstance(value, str), "a text"
    if not fits and value is not None:
        raise UserError(f"{where} is {str(value)[:40]!r}: it is {kind}")


def template_columns(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
        UserError: it names none, or says more of one than its name.
    """
    try:
        parts = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"template {template!r} cannot be read: {error}") from error
    if not parts or any(not name.isidentifier() or spec or how for name, spec, how in parts):
        raise UserError(
            f"template {template!r}: it holds the row's columns as {{name}}, at least one, and nothing else"
        )
    return [name for name, _, _ in parts]
