"""One reader of small files, with limits: what a run left, or a user wrote, may have been cut off, changed or made up.

A file is a regular one of limited size in UTF-8; its JSON or YAML is of limited depth; its content fits a schema. What
does not is `Unreadable`, whose message is the reason without the file's name, so that every reader can say its own
sentence. A missing file stays a FileNotFoundError.
"""

import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import yaml

from isotune.io.errors import first_line, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_BYTES = 2**26  # of JSON; a checkpoint's manifest of thousands of ranks has a few megabytes
MAX_YAML_BYTES = 2**20  # PyYAML reads a megabyte in seconds
MAX_DEPTH = 64
MAX_YAML_VALUES = 200_000  # after every alias has been replaced by what it stands for
KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
_YAML_TAG = "tag:yaml.org,2002:"
T = TypeVar("T")


class Unreadable(ValueError):
    """The message is the reason, which ends a sentence; `line`, from 1, is where, if that is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line

    def of(self, name: object) -> str:
        """The sentence about a file: `FILE, line 3 is not YAML: ...`."""
        where = f"{name}, line {self.line}" if self.line is not None else str(name)
        reason = str(self)
        return f"{where} {reason.removeprefix('it ')}" if reason.startswith("it ") else f"{where}: {reason}"


def kind_of_file(mode: int) -> str:
    """What a mode of `os.stat` stands for: a file, a folder, a pipe, a socket, or a device."""
    return next((word for is_kind, word in KINDS if is_kind(mode)), "a device")


def leads_out(place: Path, root: Path) -> bool:
    """Whether symbolic links lead from a place below `root` out of it; `root` itself may be reached by links."""
    return not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(root))


def open_file(file: Path, limit_bytes: int = MAX_BYTES, root: Path | None = None) -> BinaryIO:
    """A regular file, opened to read bytes; Unreadable where it is none or is too large.

    With `root`, also where a link leads out of that folder: what is read may be shown to others, and the run that has
    the link may be somebody else's.
    """
    if root is not None and "\0" not in str(file) and leads_out(file, root):
        raise Unreadable("it is a link that leads out of its folder, and such are not read")
    try:
        # neither waits for a pipe's other end nor reads a device
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(error.strerror or first_line(error)) from error
    except ValueError:  # a NUL in the name
        raise FileNotFoundError(str(file)) from None
    status = os.fstat(descriptor)
    reason = None
    if (kind := kind_of_file(status.st_mode)) != "a file":
        reason = f"it is {kind}, not a file"
    elif status.st_size > limit_bytes:
        reason = f"it has {status.st_size:,} bytes, and at most {limit_bytes:,} are read"
    if reason is not None:
        os.close(descriptor)
        raise Unreadable(reason)
    return os.fdopen(descriptor, "rb")


def read_bytes(file: Path, limit_bytes: int = MAX_BYTES, root: Path | None = None) -> bytes:
    """The bytes of a regular file; Unreadable as `open_file`, or where the disk fails."""
    with open_file(file, limit_bytes, root) as opened:
        try:
            return opened.read(limit_bytes)
        except OSError as error:
            raise Unreadable(error.strerror or first_line(error)) from error


def read_text(file: Path, limit_bytes: int = MAX_BYTES, root: Path | None = None) -> str:
    """The text of a regular file; Unreadable as `read_bytes`, or where it is not UTF-8."""
    try:
        return read_bytes(file, limit_bytes, root).decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise Unreadable(f"line {line} {byte_fault(byte)}") from None


def byte_fault(byte: int) -> str:
    """The end of a sentence about a text that holds a byte that is not UTF-8."""
    return f"holds the byte 0x{byte:02x}, which is not UTF-8: save the file as UTF-8"


def parse_json(text: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; Unreadable where it is none, or is nested deeper than MAX_DEPTH."""
    try:
        value = json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise Unreadable(f"it is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise Unreadable(f"it is not JSON: {first_line(error)}", getattr(error, "lineno", None)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise Unreadable(f"it is nested deeper than {MAX_DEPTH}")
    return value


def read_json(file: Path, schema: "TypeAdapter[T]", root: Path | None = None) -> T:
    """The content of a JSON file as its schema has it; Unreadable where it is not so, or as `open_file` with `root`."""
    return checked(parse_json(read_text(file, root=root)), schema)


def read_json_object(file: Path, root: Path | None = None) -> dict[str, Any]:
    """The keys of a JSON file, whose values are for its reader to check; Unreadable as `read_json`."""
    return _with_keys(parse_json(read_text(file, root=root)))


def read_yaml_object(file: Path) -> dict[str, Any]:
    """The keys of a YAML file, with YAML's own types; Unreadable where it has none."""
    return parse_yaml_object(read_text(file, MAX_YAML_BYTES))


def parse_yaml_object(text: str) -> dict[str, Any]:
    """The keys of a YAML text, with YAML's own types; Unreadable where it has none."""
    return _with_keys(parse_yaml(text))


def checked(value: Any, schema: "TypeAdapter[T]") -> T:
    """`value`, if it fits the schema; Unreadable names the first key that does not."""
    from pydantic import ValidationError

    try:
        schema.validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        if not where:
            raise Unreadable("it has no keys") from None
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise Unreadable(f"{where} is {shown(first['input'], 40)}: {reason}") from None
    return cast("T", value)  # as it was written: no number becomes one of another type


def parse_yaml(text: str, texts: Callable[[str], bool] | None = None) -> Any:
    """The value of a YAML text, by YAML's own types; Unreadable as `compose_yaml`.

    The words of a key for which `texts` is true, also those in a list, stay the texts that stand there: YAML 1.1 takes
    `no` for false, 010 for 8, 1:30 for 90 and 2.30 for 2.3. Only null and whole numbers without a zero in front have
    their types.
    """
    loader = yaml.SafeLoader("")
    node = compose_yaml(text)
    if texts is not None and isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if texts(str(key.value)):
                for scalar in [value, *_children(value)]:
                    _keep_text(scalar)
    try:
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error) from None
    except (ValueError, OverflowError, TypeError) as error:  # a date that is none, a number of no base
        raise Unreadable(f"it is not YAML: {first_line(error)}") from None


def _keep_text(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag != _YAML_TAG + "null":
        is_number = node.tag == _YAML_TAG + "int" and (node.value == "0" or re.fullmatch(r"[1-9][0-9]*", node.value))
        node.tag = node.tag if is_number else _YAML_TAG + "str"


def compose_yaml(
    text: str, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] = yaml.SafeLoader
) -> yaml.Node | None:
    """The nodes of a YAML text; None of an empty one.

    Unreadable where it is no YAML, is nested deeper than MAX_DEPTH, holds itself, or stands for more than
    MAX_YAML_VALUES values once its aliases are replaced.
    """
    try:
        node: yaml.Node | None = _shallow(loader)(text).get_single_node()
    except yaml.YAMLError as error:
        raise _not_yaml(error) from None
    if node is not None:
        _check_nodes(node)
    return node


@functools.cache
def _shallow(loader: type[Any]) -> type[Any]:
    """The loader, which gives up at the first value that is too deep: PyYAML takes a time of the depth squared."""

    class Shallow(loader):
        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unreadable(f"it is nested deeper than {MAX_DEPTH}", self.peek_event().start_mark.line + 1)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Shallow


def _not_yaml(error: yaml.YAMLError) -> Unreadable:
    if isinstance(error, yaml.MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else None
        return Unreadable(f"it is not YAML: {error.problem}", line)
    return Unreadable(f"it is not YAML: {first_line(error)}")


def _check_nodes(root: yaml.Node) -> None:
    """Count what each node stands for once, whatever the number of its aliases, from the leaves up."""
    values: dict[int, int] = {}
    depths: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        line = node.start_mark.line + 1
        if is_done:
            children = list(_children(node))
            open_nodes.discard(id(node))
            values[id(node)] = 1 + sum(values[id(child)] for child in children)
            depths[id(node)] = 1 + max((depths[id(child)] for child in children), default=0)
            if values[id(node)] > MAX_YAML_VALUES:
                raise Unreadable(f"its aliases stand for more than {MAX_YAML_VALUES:,} values", line)
            if depths[id(node)] > MAX_DEPTH:
                raise Unreadable(f"it is nested deeper than {MAX_DEPTH}", line)
        elif id(node) in open_nodes:
            raise Unreadable("a value holds itself by an alias", line)
        elif id(node) not in values:
            open_nodes.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in _children(node))


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in level)


def _with_keys(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unreadable("it has no keys")
    if other := next((key for key in value if not isinstance(key, str)), None):
        raise Unreadable(f"its key {shown(other, 40)} is not a text")
    return value
