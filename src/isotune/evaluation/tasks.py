"""What is evaluated, as a small YAML file: a data set is added without a line of code.

The fields of a class of tasks are the keys of its file. A command line's flags win over the file.
"""

import string
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast, get_args

from isotune.config.recipes import NO_IDS, LabelSource
from isotune.data.class_index import NameIndex, label_of, place_of
from isotune.data.documents import check_left_out, digest
from isotune.data.mixture import open_mixture
from isotune.data.sft.forms import TEXT_FIELD, Content, NamedColumns
from isotune.data.sft.messages import ASSISTANT, USER, Example, Message
from isotune.data.sft.reading import example_of_text, read_contents, without_header
from isotune.data.sources.source import Row, Source, is_null, read_rows
from isotune.evaluation.metrics.modules import TEXTS, Column, MetricModule, read_metrics
from isotune.evaluation.metrics.of_type import ALL_COLUMNS, ALL_METRICS
from isotune.evaluation.metrics.text import TEXT_METRICS
from isotune.io.errors import UserError, did_you_mean
from isotune.io.formats import base_name
from isotune.io.reading import MAX_YAML_BYTES, Unreadable, parse_yaml, read_text

DEFAULT_MAX_NEW_TOKENS = 256
PAIR = "dataset_text_pair_field"
# the keys of a classification that are flags of the command line too
FLAGS = (
    "dataset_name",
    "dataset_split",
    "dataset_config",
    "dataset_revision",
    "dataset_columns",
    "dataset_text_field",
    PAIR,
    "dataset_label_field",
    "dataset_id_field",
    "label_source",
    "ordinal",
    "label_thresholds",
    "max_seq_length",
)

# keys of rows of conversations, which earlier versions did not have
ROW_COLUMNS = ("dataset_text_field", "dataset_prompt_field", "dataset_completion_field")

TEXT_LISTS = ("labels", "dataset_columns")
NUMBER = (lambda value: type(value) is int, "a whole number")
TRUTH = (lambda value: isinstance(value, bool), "true or false")
LABEL_SOURCES = get_args(LabelSource)
LIST = "a list without doubles"
# what a key holds that is no text: how to check it, and how to call it in a message
KINDS: dict[str, tuple[Any, str]] = {
    "labels": (lambda v: isinstance(v, list) and {*map(type, v)} <= {str, int} and len({*v}) == len(v), LIST),
    "metrics": (lambda v: isinstance(v, list) and len({*map(str, v)}) == len(v), LIST),
    "dataset_columns": (lambda v: isinstance(v, list) and {*map(type, v)} == {str} and len({*v}) == len(v), LIST),
    "label_thresholds": (
        lambda v: isinstance(v, list) and bool(v) and all(type(x) in (int, float) and 0 < x < 1 for x in v),
        "a list of numbers between 0 and 1",
    ),
    "ordinal": TRUTH,
    "allow_dropped": TRUTH,
    "label_source": (lambda value: value in LABEL_SOURCES, f"one of {', '.join(LABEL_SOURCES)}"),
    "max_seq_length": NUMBER,
    "max_new_tokens": NUMBER,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to evaluate on and the metrics."""

    BUILTIN_METRICS: ClassVar[Collection[str]] = ()
    COLUMNS: ClassVar[Collection[Column]] = ()

    dataset_name: str  # a Hub id, folder, file or builtin:NAME, as in a recipe
    dataset_split: str = "test"
    dataset_columns: tuple[str, ...] | None = None  # names of the columns of a CSV file whose first line is a row
    dataset_config: str | None = None  # of a Hub id that has several configurations
    dataset_revision: str | None = None  # branch, tag or commit of a Hub id
    dataset_mixture: tuple[dict[str, Any], ...] | None = None  # that a run holds a share of out, with the run's seed
    mixture_seed: int = 0
    metrics: tuple[str | MetricModule, ...] = ()  # built-in ones and modules; all built-in ones where left out

    @property
    def name(self) -> str:
        """The name of the result's folder: the data set's own."""
        if self.dataset_mixture is not None:
            return "mixture"
        return Path(base_name(self.dataset_name.removeprefix("builtin:").rstrip("/"))).stem

    def decisive(self) -> dict[str, Any]:
        """All keys, as JSON can hold them, for a result's folder; the data themselves are told by their content."""
        apart = ("allow_dropped", "dataset_mixture", "mixture_seed")
        values = {own.name: getattr(self, own.name) for own in fields(self) if own.name not in apart}
        values = {key: value for key, value in values.items() if value is not None or key not in ROW_COLUMNS}
        for key in (PAIR, "label_thresholds", "label_source"):  # results of earlier versions knew none of these
            if values.get(key, "") is None:
                del values[key]
        return {**values, "metrics": [str(metric) for metric in self.metrics]}

    def rows(self) -> Source:
        """The rows as they stand."""
        if self.dataset_mixture is not None:
            return open_mixture(self.dataset_mixture, self.mixture_seed)
        of_hub: dict[str, Any] = {"config": self.dataset_config, "revision": self.dataset_revision}
        return read_rows(self.dataset_name, self.dataset_split, columns=self.dataset_columns, **of_hub)


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task):
    """Rows to classify."""

    BUILTIN_METRICS = ALL_METRICS
    COLUMNS = ALL_COLUMNS

    template: str | None = None  # "{title}. {text}": the text that the model reads, from the row's columns; else one
    # what is left out is the run's own column where the rows have it, else `text` and `label`
    dataset_text_field: str | None = None
    dataset_text_pair_field: str | None = None  # the second text of a pair
    dataset_label_field: str | None = None
    dataset_id_field: str | None = None  # as in a recipe: none, or null in a file, for the numbers of the rows
    # the names of the classes, in the order of the numbers where the rows hold numbers; among the model's classes they
    # are found by these names
    labels: tuple[str | int, ...] | None = None
    ordinal: bool = False  # the classes are ordered: metrics of distance are computed too
    # of multi_label: from which probability a text has a label, one number or one for each label; else the model's own
    label_thresholds: tuple[float, ...] | None = None
    max_seq_length: int | None = None  # with `overlong` as in a recipe; the run's own where left out
    overlong: str | None = None
    label_source: LabelSource | None = None  # as in a recipe; left out, the run's own for its own data, else column

    @property
    def text_column(self) -> str:
        """The column of the texts."""
        return self.dataset_text_field or "text"

    @property
    def label_column(self) -> str:
        """The column of the classes."""
        return self.dataset_label_field or "label"

    @property
    def name(self) -> str:
        """The data set's own name, with the split."""
        stem = super().name
        return stem if stem == self.dataset_split else f"{stem}-{self.dataset_split}"

    def source(self, limit: int | None = None) -> Source:
        """The first `limit` rows, with the template and the names of the classes applied; UserError for a bad row."""
        plain = self.rows()
        if self.template is None and self.labels is None and limit is None:
            return plain
        fingerprint = digest("task", plain.fingerprint, self.template, self.labels, limit)
        names = dict(plain.class_names)
        if self.labels is not None:
            others = [one for one in names.get(self.label_column, ()) if len(one) == len(self.labels)]
            names[self.label_column] = (tuple(map(str, self.labels)), *others)
        return replace(plain, fingerprint=fingerprint, read=lambda: self._rows(plain, limit), class_names=names)

    def _rows(self, plain: Source, limit: int | None) -> Iterator[Row]:
        column, listed = self.label_column, plain.class_names.get(self.label_column, ())
        known, own = NameIndex(self.labels or ()), NameIndex(listed[0]) if listed else None
        for number, row in enumerate(islice(plain.rows(), limit)):
            made = dict(row)
            if self.template is not None:
                made[self.text_column] = _fill_template(self.template, row, plain, number)
            if self.labels is not None and column in row:
                made[column] = self._class_name(row[column], known, own)
                if made[column] is None:
                    raise self._unknown_class(row[column], plain.where(number))
            yield made

    def _class_name(self, cell: Any, known: NameIndex, own: NameIndex | None) -> str | None:
        """The task's name of the class in a cell, also by a word of the data's `own` list; None where it is none."""
        with suppress(ValueError):
            place = place_of(label_of(cell), known)
            if place is None and own is not None:
                place = own.find(cell)
            if place is not None and place < len(known.names):
                return known.names[place]
        return None

    def _unknown_class(self, cell: Any, where: str) -> UserError:
        labels = tuple(map(str, self.labels or ()))
        known = ", ".join(labels)
        known = known if len(known) <= 60 else f"{known[:57]}..."
        return UserError(f"{where} is of class {str(cell)[:40]!r}, and the task knows {known}")


@dataclass(frozen=True)
class EvalSample:
    """A question with its reference, stripped and never empty; `id` is its row, `where` its name in messages."""

    id: int
    messages: tuple[Message, ...]  # what is asked: all that stands before the reference
    reference: str
    where: str
    tools: tuple[Any, ...] | None = None

    @property
    def prompt(self) -> str:
        """What is asked, for people and for files, whatever the model's form: the question, or every message."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


class EvalSamples(list[EvalSample]):
    """The prompts of an evaluation, and what became of the rows that were read for them."""

    def __init__(
        self,
        samples: Iterable[EvalSample],
        fingerprint: str,
        rows_read: int,
        left_out: Mapping[str, int],
        unlike: str | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        super().__init__(samples)
        self.notes = tuple(notes)  # what reading guessed, or passed over
        self.unlike = unlike  # how the first text without a header begins
        self.fingerprint = fingerprint  # of the source's content
        self.rows_read, self.left_out = rows_read, left_out  # rows by the reason for which they are no sample


@dataclass(frozen=True, kw_only=True)
class GenerationTask(Task):
    """Prompts with references: from columns by templates, or the first turn of each conversation."""

    BUILTIN_METRICS = TEXT_METRICS
    COLUMNS = TEXTS

    prompt_template: str | None = None  # "What is the capital of {country}?", from the row's columns
    reference_template: str | None = None  # "{capital}"; both or neither
    # as in a recipe: the column of the conversations, or those of a question and its answer
    dataset_text_field: str | None = None
    dataset_prompt_field: str | None = None
    dataset_completion_field: str | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    metrics: tuple[str | MetricModule, ...] = TEXT_METRICS
    allow_dropped: bool = False  # go on where more than half of the rows are left out

    def samples(self, limit: int | None = None, *, show: bool = False) -> EvalSamples:
        """The first `limit` prompts with their references; UserError where a column is absent or a text is empty.

        A row that holds no conversation of a question and an answer is left out, and counted; `show` asks for a warning
        on stdout where these are many.
        """
        if self.prompt_template is None or self.reference_template is None:
            named = NamedColumns(
                self.dataset_text_field or TEXT_FIELD, self.dataset_prompt_field, self.dataset_completion_field
            )
            return eval_samples_of(self.rows(), limit, named, allow_dropped=self.allow_dropped, show=show)
        source = self.rows()
        made = list(islice(self._from_columns(source), limit))
        return EvalSamples(made, source.fingerprint, len(made), {}, notes=source.notes)

    def _from_columns(self, source: Source) -> Iterator[EvalSample]:
        templates = {"prompt": str(self.prompt_template), "reference": str(self.reference_template)}
        for number, row in enumerate(source.rows()):
            texts = {key: _fill_template(one, row, source, number).strip() for key, one in templates.items()}
            if empty := [key for key, text in texts.items() if not text]:
                raise UserError(f"{source.where(number)} has an empty {empty[0]}")
            question = {"role": USER, "content": texts["prompt"]}
            yield EvalSample(number, (question,), texts["reference"], source.where(number))


NO_ANSWER, NO_QUESTION, NOT_WORDS = "without an answer", "without a question before an answer", "already tokenised"
ALL_MARKED = "with answers that are all marked not to be learnt"


def eval_samples_of(
    source: Source,
    limit: int | None = None,
    named: NamedColumns | None = None,
    *,
    allow_dropped: bool = False,
    show: bool = False,
) -> EvalSamples:
    """The first question of each conversation of some rows with its answer; UserError where none or few have them.

    Rows are read as those of training are. What stands before the question is asked with it.
    """
    samples = _first_exchanges(source, limit, named or NamedColumns())
    if not samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in samples.left_out.items())
        what = "has no conversation with a question and an answer: there is no reference to compare with"
        unlike = f"; {samples.unlike}: give the conversations as messages, or templates in a --task file"
        raise UserError(f"dataset_name: {source.name} {what}; rows: {reasons}{unlike if samples.unlike else ''}")
    check_left_out(source.name, samples.rows_read, samples.left_out, allowed=allow_dropped, show=show)
    return samples


def _first_exchanges(source: Source, limit: int | None, named: NamedColumns) -> EvalSamples:
    """The first question and answer of each conversation, in the first rows that have `limit` of them."""
    samples: list[EvalSample] = []
    left_out: Counter[str] = Counter()
    read, unlike = 0, None
    guesses: list[str] = []
    for row, content in chain.from_iterable(read_contents(source, named, guesses, in_words=True)):
        if len(samples) == limit:
            break
        read += 1
        unlike = unlike or without_header(row, content)
        found = _first_exchange(content)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            messages, reference, tools = found
            samples.append(EvalSample(row, messages, reference, source.where(row), tools))
    return EvalSamples(samples, source.fingerprint, read, dict(left_out), unlike, [*guesses, *source.notes])


def _first_exchange(content: Content) -> tuple[tuple[Message, ...], str, tuple[Any, ...] | None] | str:
    """The messages before the first answer in words to a question, that answer, and the tools; or why there is none.

    Two messages of one role are one turn, so the answer is all that the assistant says until somebody else speaks. An
    answer that is marked not to be learnt is no reference.
    """
    if not isinstance(content, Example | str):
        return NOT_WORDS
    example = content if isinstance(content, Example) else example_of_text(content)
    why = NO_ANSWER
    for number, message in enumerate(example.messages[example.asked :], start=example.asked):
        if message["role"] != ASSISTANT or not message["content"].strip() or message.get("tool_calls"):
            continue
        if not any(earlier["role"] == USER for earlier in example.messages[:number]):
            why = NO_QUESTION
        elif not example.learn[number]:
            why = ALL_MARKED
        else:
            turn = _turn_from(example, number)
            return example.messages[:number], turn, example.tools
    return why


def _turn_from(example: Example, number: int) -> str:
    """What the assistant says from this message on until somebody else speaks, or it calls a tool."""
    texts: list[str] = []
    for message, learn in zip(example.messages[number:], example.learn[number:], strict=True):
        if message["role"] != ASSISTANT or message.get("tool_calls") or not learn:
            break
        texts.append(message["content"].strip())
    return "\n".join(text for text in texts if text)


T = TypeVar("T", bound=Task)


def read_task(kind: type[T], file: str | Path | None, flags: Mapping[str, Any]) -> T:
    """The task of a file and of flags; flags that are not None win. UserError for a mistake in either."""
    layers = (_read_keys(kind, Path(file)) if file is not None else {}, flags)
    values: dict[str, Any] = {key: value for layer in layers for key, value in layer.items() if value is not None}
    if not values.get("dataset_name"):
        raise UserError("there is nothing to evaluate on: use --dataset_name or --task")
    if ("prompt_template" in values) != ("reference_template" in values):
        raise UserError(f"{file}: prompt_template and reference_template go together: give both or neither")
    for key, value in values.items():
        if key.endswith("template"):
            _template_columns(value)
    if "metrics" in values:
        values["metrics"] = read_metrics(values["metrics"], kind.BUILTIN_METRICS, kind.COLUMNS, f"{file}: metrics")
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**arguments)


def _read_keys(kind: type[Task], file: Path) -> dict[str, Any]:
    try:
        keys = parse_yaml(read_text(file, MAX_YAML_BYTES), lambda key: key not in KINDS or key in TEXT_LISTS)
    except FileNotFoundError:
        raise UserError(f"the task file {file} cannot be read: there is no such file") from None
    except Unreadable as reason:
        raise UserError(f"the task file {file} cannot be read: {reason}") from None
    if not isinstance(keys, dict):
        raise UserError(f"the task file {file} holds no keys")
    known = [field.name for field in fields(kind)]
    for key, value in list(keys.items()):
        if key not in known:
            raise UserError(f"{file}: there is no key {key!r}{did_you_mean(key, known)}")
        if key not in KINDS and type(value) is int:
            value = keys[key] = str(value)
        elif key == "dataset_columns" and isinstance(value, list):
            value = keys[key] = [str(name) if type(name) is int else name for name in cast("list[Any]", value)]
        elif key == "dataset_id_field" and value is None:  # as in a recipe
            value = keys[key] = NO_IDS
        fits, name = KINDS.get(key, (lambda value: isinstance(value, str), "a text"))
        if value is not None and not fits(value):
            raise UserError(f"{file}: {key} is {str(value)[:40]!r}: it is {name}")
    return keys


def _template_columns(template: str) -> list[str]:
    """The columns that a template names: at least one, and nothing but the column's name between braces."""
    try:
        parts = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"template {template!r} cannot be read: {error}") from error
    if not parts or any(not name.isidentifier() or spec or how for name, spec, how in parts):
        needs = "it holds the row's columns as {name}, at least one, and nothing else"
        raise UserError(f"template {template!r}: {needs}")
    return [name for name, _, _ in parts]


def _fill_template(template: str, row: Row, source: Source, number: int) -> str:
    for column in _template_columns(template):
        if column not in row:
            raise source.lacks(number, row, column, "the template")
        if is_null(row[column]):
            raise UserError(f"{source.where(number)}, column {column!r}, is null: the template has no text for it")
    return template.format_map(row)
