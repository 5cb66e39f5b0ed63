"""The command line of a recipe: `--config FILE` and a flag for every key; --help is short, --help-all complete."""

import argparse
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from isotune.config.layers import ALIASES, Layer, read_file
from isotune.config.schema import GROUPS, Key, describe, metavar, takes
from isotune.config.unsupported_keys import NAMES_BY_ANSWER
from isotune.io.errors import UserError


@dataclass(frozen=True)
class CommandLine:
    """A command line that is split into flags before it is known which keys a recipe has."""

    config: Path | None  # the recipe file, or None for flags alone
    flags: Mapping[str, Sequence[str]]  # the words after each flag, by its name with underscores and without dashes

    @classmethod
    def parse(cls, argv: Sequence[str], default_config: Path | None = None) -> Self:
        """Split a command line such as `--config FILE --learning_rate 1e-4`; UserError for a word of no flag."""
        flags: dict[str, list[str]] = {}
        open_words: list[str] | None = None  # those of the flag before, which `--name=value` closes
        for word in argv:
            if word.startswith("--") or word == "-h":
                name, has_value, value = word.lstrip("-").partition("=")
                name = name.replace("-", "_")
                flags[name] = [value] if has_value else []
                open_words = None if has_value else flags[name]
            elif open_words is None:
                raise _stray(word)
            else:
                open_words.append(word)
        config = flags.pop("config", None)
        if config is None:
            return cls(default_config, flags)
        if len(config) != 1:
            raise _stray(config[1]) if config else UserError("--config: expected one argument")
        return cls(Path(config[0]), flags)

    def given(self) -> dict[str, Any]:
        """Every value that the file and the flags give, as written, by the key's proper name; a flag wins."""
        values = dict(read_file(self.config).given) if self.config is not None else {}
        values |= {name: " ".join(words) for name, words in self.flags.items()}
        return {ALIASES.get(name, name): value for name, value in values.items()}

    def layers(self, keys: Mapping[str, Key]) -> list[Layer]:
        """The layers of a recipe with these keys: the file, where there is one, and the flags.

        UserError where the file cannot be read, or a flag has too few or too many words for its key.
        """
        flags = {
            name: _flag_value(name, words, keys.get(ALIASES.get(name, name))) for name, words in self.flags.items()
        }
        return [*([read_file(self.config)] if self.config is not None else []), Layer(flags, flags=True)]

    def answer_help(self, keys: Mapping[str, Key], default_config: Path | None, prog: str, description: str) -> None:
        """Print the help and end the program where `--help`, `-h` or `--help-all` is among the flags."""
        show_all = "help_all" in self.flags
        if not show_all and not {"help", "h"} & self.flags.keys():
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":
            text = _help(keys, default_config, prog, description, show_all)
            try:
                print(text + (_unsupported_keys(keys) if show_all else ""), flush=True)
            except BrokenPipeError:  # a reader such as `head` may close the pipe before the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)


def _stray(word: str) -> UserError:
    return UserError(f"{word!r} belongs to no flag: write --KEY VALUE")


def _flag_value(name: str, words: Sequence[str], key: Key | None) -> str | list[str]:
    if key is None:  # whatever its words, an unknown key is refused by its name
        return " ".join(words)
    is_list = takes(key, list, tuple)
    if not words:
        if takes(key, bool):
            return "true"
        raise UserError(f"--{name}: expected {'at least one' if is_list else 'one'} argument")
    if len(words) > 1 and not is_list:
        raise _stray(words[1])
    return words[0] if len(words) == 1 else list(words)


def _help(keys: Mapping[str, Key], default_config: Path | None, prog: str, description: str, show_all: bool) -> str:
    """The help text; argparse lays it out, and does not parse."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE] [--KEY VALUE ...]",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        epilog=None
        if show_all
        else "--help-all lists the remaining keys too, and what replaces the keys of other tools.",
    )
    default = f" (default: {default_config})" if default_config is not None else ""
    parser.add_argument("--config", metavar="FILE", help=f"recipe in YAML; a flag wins over it{default}")
    for group in GROUPS:
        section = parser.add_argument_group(group)
        for key in keys.values():
            if key.group == group and (show_all or key.common):
                nargs = "?" if takes(key, bool) else "+" if takes(key, list, tuple) else None
                section.add_argument(f"--{key.name}", metavar=metavar(key), help=_help_of(key), nargs=nargs)
    return parser.format_help()


def _help_of(key: Key) -> str:
    if key.required:
        default = "required"
    elif key.default_text is not None:
        default = f"default: {key.default_text}"
    elif key.default is None:
        default = "default: none"
    else:
        value: Any = " ".join(key.default) if takes(key, list) else key.default
        default = f"default: {str(value).lower() if isinstance(value, bool) else value}"
    what = f"{key.help}: {describe(key)}" if metavar(key) == "NAME" and not takes(key, list) else key.help
    return f"{what} ({default})".replace("%", "%%")


def _unsupported_keys(keys: Mapping[str, Key]) -> str:
    paragraphs = [
        textwrap.fill(f"{', '.join(others)}: {answer}", width=120, initial_indent="  ", subsequent_indent="      ")
        for answer, names in NAMES_BY_ANSWER.items()
        if (others := [name for name in names if name not in keys])
    ]
    return "\n".join(["", "Keys of other tools, and what replaces them:", *paragraphs])
