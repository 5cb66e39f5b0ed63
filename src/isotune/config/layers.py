"""A recipe is said in layers, a file and then the command line: the later wins, and a mistake names its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isotune.config.engine_keys import ALIASES
from isotune.config.schema import Contradiction, Key
from isotune.config.unsupported_keys import REFUSED
from isotune.config.values import parse
from isotune.io.errors import Complain, refuse
from isotune.io.near_names import nearest

# One of each pair is enough: a later layer that gives one puts the other of an earlier layer out of force.
ALTERNATIVES = (("max_steps", "num_train_epochs"), ("eval_dataset_name", "eval_split_share"))


@dataclass(frozen=True)
class Layer:
    """Values given in one place.

    `file` names a recipe file, `lines` the line of every key in it; `flags` marks the command line.
    """

    given: Mapping[str, Any]
    file: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict)
    flags: bool = False

    def name_of(self, name: str) -> str:
        """A key as it was written here, with its place."""
        if self.file is not None:
            line = self.lines.get(name)
            return f"{self.file}{f', line {line}' if line else ''}: {name}"
        return f"--{name}" if self.flags else name


def settle(
    keys: Mapping[str, Key],
    layers: Sequence[Layer],
    contradictions: Sequence[Contradiction],
    complain: Complain = refuse,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The value of every key after all layers, and the part of it that was given rather than filled in.

    A key that has no effect among the final values is an error where it was given in the last place that spoke, or
    had no effect in its own file either. Where only a later layer took its effect away (`--tune full` over a LoRA
    recipe), it is dropped. With a `complain` that returns, what is wrong is left out and the rest is looked at too.

    Raises:
        UserError: an unknown, refused, missing or ineffective key, a value that is not allowed, a contradiction.
    """
    given: dict[str, Any] = {}
    origin: dict[str, Layer] = {}
    effective_before: set[str] = set()
    for layer in layers:
        spoken = _read(keys, layer, complain)
        for one, other in (*ALTERNATIVES, *((b, a) for a, b in ALTERNATIVES)):
            if _says(keys, spoken, one):
                given.pop(other, None)
        for name, value in spoken.items():
            given.pop(name, None)
            if value != keys[name].unset:
                given[name] = value
                origin[name] = layer
        values = fill(keys, given)
        if layer is not layers[-1]:
            effective_before |= {name for name in given if keys[name].in_effect(values)}
    missing = _require(keys, fill(keys, given), layers, complain)
    given |= dict.fromkeys(missing, "")
    values = fill(keys, given)
    for name in [name for name in given if not keys[name].in_effect(values)]:
        need = keys[name].needs
        if need and (origin[name] is layers[-1] or name not in effective_before):
            complain(f"{origin[name].name_of(name)} has no effect: {need.otherwise}")
        del given[name]
    values = fill(keys, given)
    for contradiction in contradictions:
        if not missing & set(contradiction.keys) and contradiction.holds(values):
            places = [origin[name].name_of(name) if name in given else name for name in contradiction.keys]
            said = [f"{place} ({_shown(values[name])})" for place, name in zip(places, contradiction.keys, strict=True)]
            verb = "cannot be" if len(said) == 1 else "contradict each other"
            complain(f"{' and '.join(said)} {verb}: {contradiction.remedy_for(values)}")
    return values, given


def fill(keys: Mapping[str, Key], given: Mapping[str, Any]) -> dict[str, Any]:
    """Given values and, for the rest, defaults; a required key that is missing is None."""
    values = {name: given.get(name, None if key.required else key.default) for name, key in keys.items()}
    for name, key in keys.items():
        if key.default_from is not None and name not in given:
            values[name] = key.default_from(values)
    return values


def _read(keys: Mapping[str, Key], layer: Layer, complain: Complain) -> dict[str, Any]:
    """The values of one layer under their proper names, each as its key takes it."""
    spoken: dict[str, Any] = {}
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
            spoken[name] = parse(keys[name], value)
        except ValueError as error:
            shown = "empty" if value is None else "a secret" if keys[name].secret else repr(value)
            complain(f"{layer.name_of(written)} is {shown}: {error}")
    for one, other in ALTERNATIVES:
        if _says(keys, spoken, one) and _says(keys, spoken, other):
            complain(f"{layer.name_of(one)} and {other} contradict each other: keep one of them")
    return spoken


def _says(keys: Mapping[str, Key], spoken: Mapping[str, Any], name: str) -> bool:
    return name in spoken and spoken[name] != keys[name].unset


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _why_not_a_key(keys: Mapping[str, Key], written: str, layer: Layer) -> str:
    if written in REFUSED:
        return f"is not a key here: {REFUSED[written]}"
    near = nearest(written, [*keys, *ALIASES, *REFUSED])
    if not near:
        return "is not a key: --help-all lists them"
    if near in REFUSED and near not in keys:
        return f"is not a key, nor is {near}: {REFUSED[near]}"
    return f"is not a key: did you mean {'--' if layer.flags else ''}{near}?"


def _require(
    keys: Mapping[str, Key], values: Mapping[str, Any], layers: Sequence[Layer], complain: Complain
) -> set[str]:
    """The required keys that are missing, after they have been complained of."""
    missing = [name for name, key in keys.items() if key.required and not values[name]]
    if missing:
        file = next((layer.file for layer in layers if layer.file is not None), None)
        where = f"{file}: " if file else ""
        verb = "is" if len(missing) == 1 else "are"
        flags = " ".join(f"--{name} ..." for name in missing)
        complain(f"{where}{', '.join(missing)} {verb} missing: add to the recipe, or give {flags}")
    return set(missing)
