"""The schema of a recipe: each key is one record of its type, default, range, help and the case in which it counts.

pydantic validates a key's value by the type, and the spellings of YAML files and flags are added here. A value is
accepted in the same spellings from a file, a flag and Python; one that is not allowed is answered with what the key
takes, in words.
"""

import contextlib
import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from isotune.io.errors import nearest
from isotune.io.reading import kind_of_file, parse_json

GROUPS = (
    "Model", "Data", "Batch and schedule", "Optimiser", "Adapter", "Precision and memory", "Output and logging",
)  # fmt: skip
MODEL, DATA, SCHEDULE, OPTIMISER, ADAPTER, MEMORY, OUTPUT = GROUPS

REQUIRED = dataclasses.MISSING

_NULL = frozenset({"none", "null", ""})
_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "BOOL"),
    int: ("a whole number", "N"),
    float: ("a number", "X"),
    str: ("text", "TEXT"),
    list[str]: ("a list of names", "NAME"),
    list[float]: ("a list of numbers", "X"),
    list[int]: ("a list of whole numbers", "N"),
    tuple[str, ...]: ("a list of texts", "TEXT"),
    list[dict[str, Any]]: ("a list of data sets", "JSON"),
}

Values = Mapping[str, Any]
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4096  # of Linux's file systems; others take no more


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


CEILING = 1e9  # of a number whose range has no end: what is larger is a slip of the pen
POSITIVE = Range(0, low_open=True)
SHARE, ANY_SHARE = Range(0, 1, high_open=True), Range(0, 1)


@dataclass(frozen=True)
class Requirement:
    """When a key has an effect, and the sentence for a key that has none."""

    is_met: Callable[[Values], bool]
    otherwise: str


@dataclass(frozen=True)
class Key:
    """One key of a recipe, which is also the flag `--NAME`."""

    name: str
    takes: Any  # the type annotation of its value
    default: Any
    group: str
    help: str
    allowed: Range | None = None
    needs: Requirement | None = None
    unset: Any = None  # the value that means "not given"
    if_empty: Any = None  # what null, none and an empty text mean, where that is not "not given"
    default_from: Callable[[Values], Any] | None = None  # computes the default from the other values
    default_text: str | None = None  # describes that
    step_count: bool = False  # steps that may also be a share of the run: whole from 1 on, any fraction below
    common: bool = True  # shown by --help; the other keys are shown by --help-all only
    changes_result: bool = True  # whether runs that differ in this key are different experiments
    is_path: bool = False  # a leading ~ is the home folder
    read: Callable[[Any], Any] | None = None  # the value from any spelling of it, where no type says enough

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
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Contradiction:
    """Keys whose values exclude each other."""

    keys: tuple[str, ...]
    holds: Callable[[Values], bool | str | None]  # whether they do; a text is the remedy
    remedy: str = ""


def parse(key: Key, value: Any) -> Any:
    """The value of `key`, from the text of a file or flag or from a Python value; ValueError says what is allowed."""
    _, choices, optional = _members(key.takes)
    if key.if_empty is not None and (value is None or (isinstance(value, str) and value.lower() in _NULL)):
        return key.if_empty
    if optional and (value is None or (isinstance(value, str) and value.lower() in _NULL)):
        return None
    if key.read is not None:
        return key.read(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, str):
        _check_text(value)
    if key.is_path and isinstance(value, str):
        value = os.path.expanduser(value)
        check_name(value)
    try:
        parsed = _validator(key.takes, key.allowed, key.step_count).validate_python(value)
    except (ValidationError, OverflowError):  # the second of a whole number that no float holds
        if (ceiling := _exceeded(key, value)) is not None:
            raise ValueError(f"it takes {describe(key)}, and at most {ceiling:,.0f}") from None
        near = nearest(value, choices) if isinstance(value, str) else None
        raise ValueError(f"it takes {describe(key)}{f': did you mean {near}?' if near else ''}") from None
    return int(parsed) if key.step_count and float(parsed).is_integer() else parsed


def check_name(name: str) -> None:
    """ValueError for the name of a file or folder that no file system takes."""
    _check_text(name)
    if len(name.encode()) >= MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in name.split("/")):
        raise ValueError(f"a name has at most {MAX_NAME_BYTES} bytes, and a path {MAX_PATH_BYTES - 1:,}")
    with contextlib.suppress(OSError):  # nothing is there, or nothing that this user may see
        kind = kind_of_file(os.stat(name).st_mode)
        if kind not in ("a file", "a folder"):
            raise ValueError(f"it is {kind}, not a file or a folder")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError("a text holds no NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8") from None


def _ceiling(allowed: Range | None) -> float:
    """The largest number that is taken; the range says its own where it ends."""
    return CEILING if allowed is None or allowed.high == math.inf else allowed.high


def _exceeded(key: Key, value: Any) -> float | None:
    """The ceiling that a number is above; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        number = math.inf
    is_open = key.allowed is None or key.allowed.high == math.inf
    return _ceiling(key.allowed) if is_open and _ceiling(key.allowed) < number else None


def describe(key: Key) -> str:
    """What a key takes, in words."""
    if key.step_count:
        return f"a number of steps {key.allowed}: a whole number, or a share of the run below 1"
    kinds, choices, _ = _members(key.takes)
    descriptions = [_words_for(kind)[0] + (f" {key.allowed}" if key.allowed is not None else "") for kind in kinds]
    return " or ".join([*descriptions, ", ".join(choices)] if choices else descriptions)


def metavar(key: Key) -> str:
    """The short form of what a key takes, for --help."""
    kinds, choices, _ = _members(key.takes)
    if len(choices) > 4:
        return "NAME"
    return "|".join([*(_words_for(kind)[1] for kind in kinds), *choices])


def takes(key: Key, *kinds: type) -> bool:
    """Whether the value of `key` may be of one of these types; `list` stands for lists of anything."""
    return any((typing.get_origin(kind) or kind) in kinds for kind in _members(key.takes)[0])


@functools.cache
def _members(annotation: Any) -> tuple[tuple[Any, ...], tuple[str, ...], bool]:
    """An annotation as (types, choices of its Literal, whether None is allowed)."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    optional = types.NoneType in members
    members = [member for member in members if member is not types.NoneType]
    kinds = tuple(member for member in members if typing.get_origin(member) is not Literal)
    choices = tuple(word for member in members if member not in kinds for word in typing.get_args(member))
    return kinds, choices, optional


def _words_for(kind: Any) -> tuple[str, str]:
    """A type in words, and its short form."""
    if kind not in _WORDS and typing.get_origin(kind) is list and (names := typing.get_args(typing.get_args(kind)[0])):
        return f"a list of {', '.join(names)}", "NAME"
    return _WORDS.get(kind, ("a mapping", "JSON"))


@functools.cache
def _validator(annotation: Any, allowed: Range | None, step_count: bool) -> TypeAdapter[Any]:
    """pydantic's validator of an annotation, with the spellings of files and flags and the range of numbers."""
    kinds, choices, _ = _members(annotation)
    members = tuple(_with_spellings(kind, allowed, step_count) for kind in kinds)
    return TypeAdapter(cast(Any, typing.Union)[members + ((Literal[choices],) if choices else ())])


def _with_spellings(kind: Any, allowed: Range | None, step_count: bool) -> Any:
    if kind in (int, float):
        in_range = AfterValidator(functools.partial(_check_range, allowed=allowed, step_count=step_count))
        return Annotated[kind, BeforeValidator(_number), Field(allow_inf_nan=False), in_range]
    origin = typing.get_origin(kind)
    if origin is list:
        item = _with_spellings(typing.get_args(kind)[0], allowed, step_count)
        return Annotated[list[item], BeforeValidator(_words), Field(min_length=1)]
    if origin is tuple:
        return Annotated[kind, BeforeValidator(_texts), Field(min_length=1)]
    return Annotated[kind, BeforeValidator(_mapping)] if origin is dict else kind


def _check_range(number: float, *, allowed: Range | None, step_count: bool) -> float:
    if number > _ceiling(allowed):
        raise ValueError("too large")
    if (allowed is not None and number not in allowed) or (step_count and number >= 1 and not number.is_integer()):
        raise ValueError("out of range")
    return number


def _number(value: Any) -> Any:
    """A number from its text, so that `1e3` is a whole number too; true and false are not numbers."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        return float(value)


def _words(value: Any) -> list[Any]:
    """The items of a list, of which a text may hold several, separated by commas or spaces."""
    items = cast("list[Any]", value) if isinstance(value, list | tuple) else [value]
    return [part for item in items for part in (item.replace(",", " ").split() if isinstance(item, str) else [item])]


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _mapping(value: Any) -> Any:
    """A mapping, or its JSON text; values are text in a YAML file, and no key says what they should be."""
    return _natural(parse_json(value) if isinstance(value, str) else value)


def _natural(value: Any) -> Any:
    if isinstance(value, list):
        return [_natural(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {name: _natural(item) for name, item in cast("dict[str, Any]", value).items()}
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        number = _number(value)
    except ValueError:
        return value
    if not math.isfinite(number):
        return value
    return int(number) if float(number).is_integer() else number
