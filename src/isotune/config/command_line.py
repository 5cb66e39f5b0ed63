"""The command line: `--config FILE`, a flag for every key, and help that is short unless all of it is asked for."""

import argparse
import dataclasses
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from isotune.config.engine_keys import ALIASES
from isotune.config.layers import Layer
from isotune.config.schema import GROUPS, Key
from isotune.config.unsupported_keys import REFUSED
from isotune.config.values import describe, metavar, takes
from isotune.io.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub(r"^argument (\S+):", r"\1:", message))


def read_flags(
    argv: Sequence[str], keys: Mapping[str, Key], *, default_config: Path | None, prog: str, description: str
) -> tuple[Path | None, Layer]:
    """The recipe file in force and the values that flags give. `--help` and `--help-all` print and end the program.

    Raises:
        UserError: a word that belongs to no flag, or a flag without its value.
    """
    words = [re.sub(r"^--[A-Za-z][\w-]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    everything = "--help_all" in words
    parser = _parser(keys, default_config, prog, description, everything)
    if everything or "--help" in words or "-h" in words:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _show(parser.format_help() + (_refused(keys) if everything else ""))
        raise SystemExit(0)
    known, rest = parser.parse_known_args(words)
    given: dict[str, Any] = vars(known)
    config = given.pop("config", None)
    for word in rest:
        if not word.startswith("--"):
            raise UserError(f"{word!r} belongs to no flag: write --KEY VALUE")
        name, _, value = word[2:].partition("=")
        given[name] = value
        break
    return Path(config) if config is not None else default_config, Layer(given, flags=True)


def _parser(
    keys: Mapping[str, Key], default_config: Path | None, prog: str, description: str, everything: bool
) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE] [--KEY VALUE ...]",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        epilog=None
        if everything
        else "--help-all lists the remaining keys too, and what to say for keys of other tools.",
    )
    default = f" (default: {default_config})" if default_config is not None else ""
    parser.add_argument("--config", metavar="FILE", help=f"recipe in YAML; a flag wins over it{default}")
    for group in GROUPS:
        section = parser.add_argument_group(group)
        for key in keys.values():
            if key.group == group:
                _add(section, key, shown=everything or key.common)
    for alias, name in ALIASES.items():
        if name in keys:
            _add(parser, dataclasses.replace(keys[name], name=alias), shown=False)
    return parser


def _show(text: str) -> None:
    """Print help, which a reader such as `head` may leave before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refused(keys: Mapping[str, Key]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        if name not in keys:
            names.setdefault(reason, []).append(name)
    paragraphs = [
        textwrap.fill(f"{', '.join(alike)}: {reason}", width=120, initial_indent="  ", subsequent_indent="      ")
        for reason, alike in names.items()
    ]
    return "\n".join(["", "Keys of other tools, and what holds here:", *paragraphs])


def _add(section: Any, key: Key, *, shown: bool) -> None:
    nargs: dict[str, Any] = {}
    if takes(key, bool):
        nargs = {"nargs": "?", "const": "true"}
    elif takes(key, list) or takes(key, tuple):
        nargs = {"nargs": "+"}
    if key.required:
        default = "required"
    elif key.default_text is not None:
        default = f"default: {key.default_text}"
    elif key.default is None:
        default = "default: none"
    else:
        value = " ".join(key.default) if isinstance(key.default, list) else key.default
        default = f"default: {str(value).lower() if isinstance(value, bool) else value}"
    what = f"{key.help}: {describe(key)}" if metavar(key) == "NAME" and not takes(key, list) else key.help
    text = f"{what} ({default})".replace("%", "%%")
    section.add_argument(f"--{key.name}", metavar=metavar(key), help=text if shown else argparse.SUPPRESS, **nargs)
