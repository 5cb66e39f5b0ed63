"""What is evaluated, as a small YAML file: a data set is added without a line of code.

A class of tasks is a dataclass; its fields are the keys of the file. A command line's flags win over the file.
"""

import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from isotune.data.sources.source import Row, Source
from isotune.evaluation.metrics.modules import Column, MetricModule, read_metrics
from isotune.io.errors import UserError, did_you_mean, first_line


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to evaluate on and the metrics; every kind of evaluation adds its own keys.

    Attributes:
        dataset_name, dataset_split: as in a recipe.
        metrics: built-in names and modules of `evaluate` (`metrics.modules`).
    """

    BUILTIN_METRICS: ClassVar[Collection[str]] = ()
    COLUMNS: ClassVar[Collection[Column]] = ()

    dataset_name: str
    dataset_split: str = "test"
    metrics: tuple[str | MetricModule, ...] = ()

    @classmethod
    def is_builtin_metric(cls, name: str) -> bool:
        """Whether `metrics` may name it without a module."""
        return name in cls.BUILTIN_METRICS

    @classmethod
    def check(cls, values: Mapping[str, Any], where: str) -> None:
        """Check the values of keys against each other; `where` is the file, for messages.

        Raises:
            UserError: they do not fit.
        """
        for key, value in values.items():
            if key.endswith("template"):
                template_columns(value)


T = TypeVar("T", bound=Task)

# what a key holds that is no text: how to check it, and how to call it in a message
KINDS: dict[str, tuple[Any, str]] = {
    "labels": (lambda value: _is_list(value, (str, int)), "a list without doubles"),
    "metrics": (
        lambda value: isinstance(value, list) and len({*map(str, value)}) == len(value),
        "a list without doubles",
    ),
    "ordinal": (lambda value: isinstance(value, bool), "true or false"),
    "max_seq_length": (lambda value: type(value) is int, "a whole number"),
    "max_new_tokens": (lambda value: type(value) is int, "a whole number"),
}


def read_task(kind: type[T], file: str | Path | None, flags: Mapping[str, Any]) -> T:
    """The task of a file and of flags; flags that are not None win.

    Raises:
        UserError: no such file, no YAML, an unknown key or metric, a value of another kind, or no data set.
    """
    keys = _read_keys(kind, Path(file)) if file is not None else {}
    values = {key: value for layer in (keys, flags) for key, value in layer.items() if value is not None}
    if not values.get("dataset_name"):
        raise UserError("there is nothing to evaluate on: use --dataset_name or --task")
    kind.check(values, str(file))
    if "metrics" in values:
        values["metrics"] = read_metrics(
            values["metrics"], kind.is_builtin_metric, kind.BUILTIN_METRICS, kind.COLUMNS, f"{file}: metrics"
        )
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**arguments)


def _read_keys(kind: type[Task], file: Path) -> dict[str, Any]:
    """The keys of a task's file, each of its kind."""
    try:
        keys = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the task file {file} cannot be read: {first_line(error)}") from error
    if not isinstance(keys, dict):
        raise UserError(f"the task file {file} holds no keys")
    known = [field.name for field in fields(kind)]
    for key, value in keys.items():
        if key not in known:
            raise UserError(f"{file}: there is no key {key!r}{did_you_mean(key, known)}")
        fits, name = KINDS.get(key, (lambda value: isinstance(value, str), "a text"))
        if value is not None and not fits(value):
            raise UserError(f"{file}: {key} is {str(value)[:40]!r}: it is {name}")
    return keys


def template_columns(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
        UserError: it names none, or has more than the column's name between braces.
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


def fill_template(template: str, row: Row, source: Source, number: int) -> str:
    """A template with the columns of row `number` of a source.

    Raises:
        UserError: the row lacks a column.
    """
    for column in template_columns(template):
        if column not in row:
            raise UserError(
                f"{source.where(number)} lacks the column {column!r} of the template; it has {', '.join(row)}"
            )
    return template.format_map(row)


def _is_list(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value) and len(set(value)) == len(value)
