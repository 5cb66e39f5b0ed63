"""Values become what a key takes, by one rule for a file, a flag and Python; what is not allowed is said in words."""

import json
import math
import os
import types
import typing
from typing import Any, Literal

from isotune.config.schema import Key, Range
from isotune.io.near_names import nearest

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_NOTHING = frozenset({"none", "null", ""})


class _Numbers(list[float]):
    """What `list[float]` in a key's annotation stands for, beside a list of names."""


def parse(key: Key, value: Any) -> Any:
    """The value of `key`, from the text of a file or flag or from a Python value.

    Raises:
        ValueError: the value is not allowed; its message says what is.
    """
    kinds, choices, optional = _taken(key.takes)
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None or (optional and isinstance(word, str) and word.lower() in _NOTHING):
        if optional:
            return None
        raise ValueError(f"it takes {describe(key)}")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if key.is_path and isinstance(value, str):
        value = os.path.expanduser(value)
    if isinstance(value, str) and value in choices:
        return value
    if takes(key, list) and isinstance(word, str) and word in choices:  # a flag of several words, given one
        return word
    for kind in kinds:
        parsed = _READERS[kind](value)
        if parsed is not None and _is_allowed(key, parsed):
            if key.step_count and float(parsed).is_integer():
                return int(parsed)
            return parsed
    near = nearest(value, choices) if isinstance(value, str) else None
    raise ValueError(f"it takes {describe(key)}{f': did you mean {near}?' if near else ''}")


def describe(key: Key) -> str:
    """What a key takes, in words."""
    kinds, choices, _ = _taken(key.takes)
    parts = []
    for kind in kinds:
        words = _WORDS[kind]
        if kind is list and (known := _known_items(key)):
            words = f"a list of {', '.join(known)}"
        if key.step_count:
            words = f"a number of steps {key.allowed}: a whole number, or a share of the run below 1"
        elif key.allowed is not None:
            words = f"{words} {key.allowed}"
        parts.append(words)
    return " or ".join([*parts, ", ".join(choices)] if choices else parts)


def metavar(key: Key) -> str:
    """The short form of what a key takes, for --help."""
    kinds, choices, _ = _taken(key.takes)
    if len(choices) > 4:
        return "NAME"
    short = {bool: "BOOL", int: "N", float: "X", str: "TEXT", list: "NAME", _Numbers: "X", tuple: "TEXT", dict: "JSON"}
    return "|".join([*(short[kind] for kind in kinds), *choices])


def takes(key: Key, kind: type) -> bool:
    """Whether the key's value may be of this kind."""
    return any(taken is kind or (kind is list and taken is _Numbers) for taken in _taken(key.takes)[0])


def _taken(annotation: Any) -> tuple[tuple[type, ...], tuple[str, ...], bool]:
    """An annotation as (plain kinds, choices, whether None is one)."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    kinds: list[type] = []
    choices: list[str] = []
    for member in members:
        if typing.get_origin(member) is Literal:
            choices += typing.get_args(member)
        elif member is not types.NoneType:
            kinds.append(_Numbers if member == list[float] else typing.get_origin(member) or member)
    return tuple(kinds), tuple(choices), types.NoneType in members


def _known_items(key: Key) -> tuple[str, ...]:
    """The words that a list may hold, where its key names them: `list[Literal["a", "b"]]`."""
    items = typing.get_args(key.takes) if typing.get_origin(key.takes) is list else ()
    return tuple(word for item in items for word in typing.get_args(item))


def _is_allowed(key: Key, value: Any) -> bool:
    if key.allowed is not None and not _within(key.allowed, value):
        return False
    known = _known_items(key)
    if known and not set(value) <= set(known):
        return False
    return not key.step_count or value < 1 or float(value).is_integer()


def _within(allowed: Range, value: Any) -> bool:
    return all(number in allowed for number in value) if isinstance(value, list) else value in allowed


def _bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return True if value.lower() in _TRUE else False if value.lower() in _FALSE else None
    return value if isinstance(value, bool) else None


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _int(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _float(value)
    return int(number) if number is not None and number.is_integer() else None


def _str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _list(value: Any) -> list[str] | None:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        return None
    words = [word for item in items for word in item.replace(",", " ").split()]
    return words or None


def _tuple(value: Any) -> list[str] | None:
    items = [value] if isinstance(value, str) else value
    whole = isinstance(items, list | tuple) and all(isinstance(item, str) for item in items)
    return list(items) if whole and items else None


def _numbers(value: Any) -> list[float] | None:
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    items = items if isinstance(items, list | tuple) else [items]
    numbers = [_float(part) for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    return numbers if numbers and None not in numbers else None  # type: ignore[return-value]


def _dict(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return {name: _natural(item) for name, item in value.items()} if isinstance(value, dict) else None


def _natural(value: Any) -> Any:
    """What a value inside a mapping looks like, where no key says what it should be."""
    if isinstance(value, list):
        return [_natural(item) for item in value]
    if isinstance(value, dict):
        return {name: _natural(item) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for reader in (_int, _float):
        if (number := reader(value)) is not None:
            return number
    return value


_READERS = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    list: _list,
    _Numbers: _numbers,
    tuple: _tuple,
    dict: _dict,
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list of names",
    _Numbers: "a list of numbers",
    tuple: "a list of texts",
    dict: "a mapping",
}
