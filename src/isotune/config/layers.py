"""A recipe's layers: a file, then the command line. The later one wins, and a mistake names the place it stands in.

A recipe file is flat YAML whose values are read as text; the key decides the type, so 1e-4 is a number.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import yaml

from isotune.config.schema import Contradiction, Key, Values, parse
from isotune.config.unsupported_keys import UNSUPPORTED
from isotune.io.errors import Complain, UserError, nearest, refuse, shown
from isotune.io.reading import MAX_YAML_BYTES, Unreadable, compose_yaml, read_text
from isotune.io.run_files import SCRIPT

# Other names of keys: transformers' newer one, for which the recipe keeps that of every tutorial; a short one; TRL's.
ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "text_pair": "dataset_text_pair_field",
    "datasets": "dataset_mixture",
}
_EMPTY = frozenset({"", "~", "null", "Null", "NULL"})
# Only one key of each pair may be given; given in a later layer, it replaces the other of an earlier layer.
ALTERNATIVES = (
    ("max_steps", "num_train_epochs"),
    ("eval_dataset_name", "eval_split_share"),
    ("eval_dataset_mixture", "eval_dataset_name"),
    ("eval_dataset_mixture", "eval_split_share"),
    ("dataset_name", "dataset_mixture"),
)


@dataclass(frozen=True)
class Layer:
    """Values that are given in one place: Python, a recipe file, or the command line."""

    given: Mapping[str, Any]  # as written, by key
    file: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict[str, int])  # of every key in the file
    flags: bool = False  # whether this is the command line

    def name_of(self, name: str) -> str:
        """A key as it was written here, with its place."""
        if self.file is not None:
            line = self.lines.get(name)
            return f"{self.file}{f', line {line}' if line else ''}: {name}"
        return f"--{name}" if self.flags else name


def read_file(path: Path) -> Layer:
    """The values that a recipe file gives, with the line of every key; UserError where it is no mapping in YAML."""
    name = str(path)
    try:
        text = read_text(path, MAX_YAML_BYTES)
    except FileNotFoundError:
        raise UserError(f"--config {name}: there is no such file") from None
    except Unreadable as reason:
        hint = ": name a recipe file in it" if os.path.isdir(path) else ""
        raise UserError(f"{reason.of(f'--config {name}')}{hint}") from None
    try:
        root = compose_yaml(text.removeprefix("\ufeff"), yaml.BaseLoader)
    except Unreadable as reason:
        raise UserError(reason.of(name)) from None
    if root is None:
        return Layer({}, file=name)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name} holds no keys: a recipe is lines of `key: value`")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in root.value}
    if SCRIPT in lines:
        raise UserError(f"{name} is the record of a script of its own, and no recipe: run the script again")
    return Layer(_value(root, name), file=name, lines=lines)


def _value(node: yaml.Node, file: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in _EMPTY else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, file) for item in node.value]
    values: dict[str, Any] = {}
    for key, item in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{file}, line {line}: a key is one word, not a list or a mapping")
        if key.value in values:
            raise UserError(f"{file}, line {line}: {key.value} is given twice: keep one of them")
        values[key.value] = _value(item, file)
    return values


def merge_layers(
    keys: Mapping[str, Key],
    layers: Sequence[Layer],
    contradictions: Sequence[Contradiction],
    complain: Complain = refuse,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The value of every key after all layers, and the part of it that was given rather than filled in.

    A key without an effect among the final values is an error where the last layer gives it, or where it had no effect
    in its own layer either. Where only a later layer took its effect away (`--tune full` over a LoRA recipe), it is
    dropped. If `complain` returns, the wrong value is left out and the rest is checked too.
    """
    given: dict[str, Any] = {}
    origin: dict[str, Layer] = {}
    effective_before: set[str] = set()
    for layer in layers:
        in_layer = _parse_layer(keys, layer, complain)
        for first, second in ALTERNATIVES:
            for name, alternative in ((first, second), (second, first)):
                if _is_set(keys, in_layer, name):
                    given.pop(alternative, None)
        for name, value in in_layer.items():
            given.pop(name, None)
            if value != keys[name].unset:
                given[name] = value
                origin[name] = layer
        if layer is not layers[-1]:
            values = _with_defaults(keys, given)
            effective_before |= {name for name in given if keys[name].in_effect(values)}
    missing = _missing(keys, _with_defaults(keys, given), layers, complain)
    given |= dict.fromkeys(missing, "")
    values = _with_defaults(keys, given)
    for name in [name for name in given if not keys[name].in_effect(values)]:
        requirement = keys[name].needs
        if requirement and given[name] is not None and (origin[name] is layers[-1] or name not in effective_before):
            complain(f"{origin[name].name_of(name)} has no effect: {requirement.otherwise}")
        del given[name]
    values = _with_defaults(keys, given)
    for contradiction in contradictions:
        if not missing & set(contradiction.keys) and (found := contradiction.holds(values)):
            named = [
                f"{origin[name].name_of(name) if name in given else name} ({_shown(values[name])})"
                for name in contradiction.keys
            ]
            verb = "cannot be" if len(named) == 1 else "contradict each other"
            complain(f"{' and '.join(named)} {verb}: {contradiction.remedy or found}")
    return values, given


def _with_defaults(keys: Mapping[str, Key], given: Values) -> dict[str, Any]:
    """Given values, and the defaults of the rest; a required key that is missing is None."""
    values = {name: given.get(name, None if key.required else key.default) for name, key in keys.items()}
    for name, key in keys.items():
        if key.default_from is not None and name not in given:
            values[name] = key.default_from(values)
    return values


def _parse_layer(keys: Mapping[str, Key], layer: Layer, complain: Complain) -> dict[str, Any]:
    """The values of one layer under their proper names, each as its key takes it."""
    values: dict[str, Any] = {}
    written_as: dict[str, str] = {}
    for written, value in layer.given.items():
        name = ALIASES.get(written, written)
        if name not in keys:
            complain(f"{layer.name_of(written)} {_why_not_a_key(keys, written, layer)}")
            continue
        if name in written_as:
            complain(f"{layer.name_of(written)} is another name of {written_as[name]}: keep one of them")
        written_as[name] = written
        try:
            values[name] = parse(keys[name], value)
        except ValueError as error:
            given = "empty" if value is None else shown(value, 80)
            complain(f"{layer.name_of(written)} is {given}: {error}")
    for name, alternative in ALTERNATIVES:
        if _is_set(keys, values, name) and _is_set(keys, values, alternative):
            complain(f"{layer.name_of(name)} and {alternative} contradict each other: keep one of them")
    return values


def _is_set(keys: Mapping[str, Key], values: Values, name: str) -> bool:
    return name in values and values[name] != keys[name].unset


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, cast("Sequence[Any]", value)))
    else:
        text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    text = text if text.isprintable() else repr(text)[1:-1]  # a message is one line
    return text if len(text) <= 200 else f"{text[:200]}..."


def _why_not_a_key(keys: Mapping[str, Key], written: str, layer: Layer) -> str:
    if written in UNSUPPORTED:
        return f"is not a key here: {UNSUPPORTED[written]}"
    tasks: dict[str, Any] = import_module("isotune.config.recipes").TASKS  # whose recipes are made of layers
    if task := next((task for task, kind in tasks.items() if written in {*kind.keys()}), None):
        return f"is not a key here: it is of the task {task} alone"
    near = nearest(written, [*keys, *ALIASES, *UNSUPPORTED])
    if not near:
        return "is not a key: --help-all lists them"
    if near in UNSUPPORTED and near not in keys:
        return f"is not a key, nor is {near}: {UNSUPPORTED[near]}"
    return f"is not a key: did you mean {'--' if layer.flags else ''}{near}?"


def _missing(keys: Mapping[str, Key], values: Values, layers: Sequence[Layer], complain: Complain) -> set[str]:
    """The required keys that are missing, after the complaint about them."""
    missing = [name for name, key in keys.items() if key.required and not values[name]]
    if missing:
        file = next((layer.file for layer in layers if layer.file is not None), None)
        where = f"{file}: " if file else ""
        verb = "is" if len(missing) == 1 else "are"
        flags = " ".join(f"--{name} ..." for name in missing)
        complain(f"{where}{', '.join(missing)} {verb} missing: add to the recipe, or give {flags}")
    return set(missing)
