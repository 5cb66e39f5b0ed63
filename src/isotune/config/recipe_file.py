"""Recipe files: flat YAML whose values are read as text; the key decides the type, so 1e-4 is a number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from isotune.config.layers import Layer
from isotune.io.errors import UserError

_EMPTY = frozenset({"", "~", "null", "Null", "NULL"})


def read_file(path: Path) -> Layer:
    """The values that a recipe file gives, with the line of every key.

    Raises:
        UserError: no such file, not YAML, not a mapping, or a key given twice.
    """
    name = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"--config {name} is a folder: name a recipe file in it") from None
    except FileNotFoundError:
        raise UserError(f"--config {name}: there is no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {name} is not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"--config {name} cannot be read: {error.strerror}") from None
    try:
        root: yaml.Node | None = yaml.BaseLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{name}{line} is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {str(error).splitlines()[0]}") from None
    if root is None:
        return Layer({}, file=name)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name} holds no keys: a recipe is lines of `key: value`")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in root.value}
    return Layer(_value(root, name), file=name, lines=lines)


def _value(node: yaml.Node, file: str, within: tuple[yaml.Node, ...] = ()) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in _EMPTY else node.value
    if node in within:
        raise UserError(f"{file}, line {node.start_mark.line + 1}: a value holds itself by an alias")
    within = (*within, node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, file, within) for item in node.value]
    values: dict[str, Any] = {}
    for key, item in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{file}, line {line}: a key is one word, not a list or a mapping")
        if key.value in values:
            raise UserError(f"{file}, line {line}: {key.value} is given twice: keep one of them")
        values[key.value] = _value(item, file, within)
    return values


def as_yaml(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a recipe file: the values of each group under a comment that names it."""
    sections = [
        f"# {group}\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1_000_000)}"
        for group, values in groups.items()
        if values
    ]
    return "\n".join(sections)
