"""The schema of a recipe: each key is one record of its type, default, range, help and the case in which it counts."""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MODEL = "Model"
DATA = "Data"
SCHEDULE = "Batch and schedule"
OPTIMISER = "Optimiser"
ADAPTER = "Adapter"
MEMORY = "Precision and memory"
OUTPUT = "Output and logging"
GROUPS = (MODEL, DATA, SCHEDULE, OPTIMISER, ADAPTER, MEMORY, OUTPUT)

REQUIRED = dataclasses.MISSING

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end is itself not allowed, `also` names one number outside."""

    low: float
    high: float = float("inf")
    low_open: bool = False
    high_open: bool = False
    also: float | None = None

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        return (above and below) or number == self.also

    def __str__(self) -> str:
        text = f"{'above' if self.low_open else 'of at least'} {self.low:g}"
        if self.high != float("inf"):
            text += f" and {'below' if self.high_open else 'at most'} {self.high:g}"
        return text if self.also is None else f"{text}, or {self.also:g}"


AT_LEAST_ONE = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, low_open=True)
SHARE = Range(0, 1, high_open=True)


@dataclass(frozen=True)
class Requirement:
    """When a key has an effect, and the sentence for a key that has none."""

    is_met: Callable[[Values], bool]
    otherwise: str


@dataclass(frozen=True)
class Key:
    """One key of a recipe, which is also the flag `--NAME`.

    Attributes:
        takes: the type annotation of its value.
        unset: the value that means "not given".
        default_from: computes the default from the other values; `default_text` describes it.
        step_count: a number of steps that may also be a share of the run: whole from 1 on, any fraction below.
        common: shown by --help; the other keys are shown by --help-all only.
        changes_result: whether runs that differ in this key are different experiments.
        is_path: a leading ~ is the home folder.
        secret: never shown and never written.
    """

    name: str
    takes: Any
    default: Any
    group: str
    help: str
    allowed: Range | None = None
    needs: Requirement | None = None
    unset: Any = None
    default_from: Callable[[Values], Any] | None = None
    default_text: str | None = None
    step_count: bool = False
    common: bool = True
    changes_result: bool = True
    is_path: bool = False
    secret: bool = False

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is REQUIRED

    def in_effect(self, values: Values) -> bool:
        """Whether the key has an effect among these values."""
        return self.needs is None or self.needs.is_met(values)


def key(default: Any, group: str, help: str, **more: Any) -> Any:
    """A dataclass field that is a key of the recipe; `more` are further attributes of `Key`."""
    metadata = {"key": {"default": default, "group": group, "help": help, **more}}
    return dataclasses.field(default=default, metadata=metadata, repr=not more.get("secret", False))


def keys_of(recipe_class: type) -> dict[str, Key]:
    """The keys that a recipe's dataclass declares, in the order of their declaration."""
    annotations = typing.get_type_hints(recipe_class)
    return {
        field.name: Key(name=field.name, takes=annotations[field.name], **field.metadata["key"])
        for field in dataclasses.fields(recipe_class)
        if "key" in field.metadata
    }


@dataclass(frozen=True)
class Contradiction:
    """Keys whose values exclude each other, and the remedy: a sentence, or a function of the values that gives one."""

    keys: tuple[str, ...]
    holds: Callable[[Values], bool]
    remedy: str | Callable[[Values], str]

    def remedy_for(self, values: Values) -> str:
        """The remedy for a recipe of these values."""
        return self.remedy if isinstance(self.remedy, str) else self.remedy(values)
