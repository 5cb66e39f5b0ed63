"""What every recipe can do, whatever its keys: be read from layers, changed, resolved, fingerprinted and written."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import yaml

from isotune.config.layers import Layer, merge_layers
from isotune.config.schema import GROUPS, Contradiction, Key
from isotune.io.errors import Complain, UserError, refuse, shown
from isotune.io.files import replace_file


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """A recipe whose fields are its keys. All values are checked: make one with `from_values` or `read_recipe`.

    A key that has no effect beside the others (`r` in full tuning) holds its default. `given` holds the values that
    were given rather than filled in.
    """

    given: dict[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)
    values: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)  # the value of every key

    contradictions: ClassVar[tuple[Contradiction, ...]] = ()
    found_in_data: ClassVar[frozenset[str]] = frozenset()  # keys that the data decide where nobody gives them

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """Every key of this recipe by its name, in the order of their declaration."""
        annotations = get_type_hints(cls)
        return {
            own.name: Key(name=own.name, takes=annotations[own.name], **own.metadata["key"])
            for own in fields(cls)
            if "key" in own.metadata
        }

    @classmethod
    def from_layers(cls, layers: Sequence[Layer], complain: Complain = refuse) -> Self:
        """The recipe that layers of values give together, the last one winning; UserError says what is wrong.

        `complain` takes each mistake; where it returns, the recipe is made of the rest.
        """
        keys = cls.keys()
        task = keys["task"].default
        for layer in layers:  # before the keys of another task are called unknown one by one
            other = layer.given.get("task", task)
            if other != task:
                complain(f"{layer.name_of('task')} is {shown(other)}: this command runs recipes of task: {task}")
        values, given = merge_layers(keys, layers, cls.contradictions, complain)
        own = {own.name: values[own.name] for own in fields(cls) if own.name in values}
        return cls(**own, values=values, given=given)

    @classmethod
    def from_values(cls, **values: Any) -> Self:
        """A recipe from Python: `Recipe.from_values(model_name_or_path=..., ...)`; UserError says what is wrong."""
        return cls.from_layers([Layer(values)])

    def with_values(self, **changes: Any) -> Self:
        """This recipe with other values, which win as flags win over a file; UserError says what is wrong."""
        return self.from_layers([Layer(self.given), Layer(changes)])

    def resolved(self) -> dict[str, Any]:
        """Every value in effect, given or default, by its key; they give the same run again."""
        return {
            name: value
            for name, key in self.keys().items()
            if (value := self.values[name]) is not None and value != key.unset
            if key.in_effect(self.values)
        }

    def result_values(self) -> dict[str, Any]:
        """The values in effect that change the result; runs that share them may differ in logging, memory and place."""
        keys = self.keys()
        return {name: value for name, value in self.resolved().items() if keys[name].changes_result}

    def fingerprint(self) -> str:
        """SHA-256 of `result_values`, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.result_values(), sort_keys=True).encode()).hexdigest()

    def as_yaml(self) -> str:
        """The text of the resolved recipe, grouped as --help is."""
        keys, sections = self.keys(), {group: dict[str, Any]() for group in GROUPS}
        for name, value in self.resolved().items():
            sections[keys[name].group][name] = value
        return "\n".join(
            f"# {group}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1_000_000)}"
            for group, values in sections.items()
            if values
        )

    def write(self, path: Path) -> None:
        """Write the resolved recipe, whole or not at all; `--config PATH` runs it again. UserError: it cannot be."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, self.as_yaml())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
