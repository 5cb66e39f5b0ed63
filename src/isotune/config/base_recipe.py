"""What every recipe can do, whatever its keys: be read from layers, changed, resolved, fingerprinted and written."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from isotune.config.layers import Layer, as_yaml, merge_layers
from isotune.config.schema import GROUPS, Contradiction, Key, keys_of
from isotune.io.errors import Complain, UserError, refuse
from isotune.io.files import replace_file


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """A recipe whose fields are its keys. All values are checked: make one with `from_values` or `read_recipe`.

    A key that has no effect beside the others (`r` in full tuning) holds its default. `given` holds the values that
    were given rather than filled in.
    """

    given: dict[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    contradictions: ClassVar[tuple[Contradiction, ...]] = ()

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """Every key of this recipe by its name."""
        return keys_of(cls)

    @classmethod
    def from_layers(cls, layers: Sequence[Layer], complain: Complain = refuse) -> Self:
        """The recipe that layers of values give together, the last one winning.

        Args:
            layers: file, flags.
            complain: takes each mistake; where it returns, the recipe is made of the rest.

        Raises:
            UserError: what is wrong, and where.
        """
        keys = cls.keys()
        check_task(layers, keys["task"].default, complain)
        values, given = merge_layers(keys, layers, cls.contradictions, complain)
        return cls(**cls.fields_from(values), given=given)

    @classmethod
    def fields_from(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of the recipe, by name, from the value of every key."""
        return values

    @classmethod
    def from_values(cls, **values: Any) -> Self:
        """A recipe from Python: `Recipe.from_values(model_name_or_path=..., learning_rate=1e-4, ...)`.

        Raises:
            UserError: what is wrong.
        """
        return cls.from_layers([Layer(values)])

    def with_values(self, **changes: Any) -> Self:
        """This recipe with other values, which win as flags win over a file.

        Raises:
            UserError: what is wrong.
        """
        return self.from_layers([Layer(self.given), Layer(changes)])

    def value_of(self, name: str) -> Any:
        """The value of a key."""
        return getattr(self, name)

    def resolved(self) -> dict[str, Any]:
        """Every value in effect, given or default, by its key, without secrets; they give the same run again."""
        keys = self.keys()
        values = {name: self.value_of(name) for name in keys}
        return {
            name: values[name]
            for name, key in keys.items()
            if values[name] is not None and values[name] != key.unset and key.in_effect(values) and not key.secret
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
        keys, resolved = self.keys(), self.resolved()
        return as_yaml({g: {name: v for name, v in resolved.items() if keys[name].group == g} for g in GROUPS})

    def write(self, path: Path) -> None:
        """Write the resolved recipe, whole or not at all; `--config PATH` runs it again.

        Raises:
            UserError: the place cannot be written to.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, self.as_yaml())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None


def check_task(layers: Sequence[Layer], task: str, complain: Complain) -> None:
    """Refuse a recipe of another task before its keys are called unknown one by one.

    Raises:
        UserError: a layer names another task, by `complain`.
    """
    for layer in layers:
        other = layer.given.get("task", task)
        if other != task:
            complain(f"{layer.name_of('task')} is {other!r}: this command runs recipes of task: {task}")
