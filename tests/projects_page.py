"""The rows of docs/projects.md: what a project asks for, the command, the files that it leaves, and the test named."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.cli import TRAINING, command_parser
from isotune.commands import start
from isotune.commands.train import KINDS, recipe_words
from isotune.commands.trained import evaluate_classifier, generate, predict, serve
from isotune.io.errors import UserError
from isotune.preflight import command as plan_command

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "projects.md"
_ROW = re.compile(r"^\| ([^|]+) \| `([^`|]+)` \| ([^|]+) \| `(tests/[\w./]+\.py)` \|$")
_HEAD = ("| it asks for |", "|---")


@dataclass(frozen=True)
class Row:
    """One row of a project's table."""

    project: str
    asked: str
    words: tuple[str, ...]  # of the command
    files: tuple[str, ...]  # that it leaves, each a path below runs/
    test: str

    @property
    def command(self) -> str:
        """`isotune classify`, or `sbatch`."""
        return " ".join(self.words[: 2 if self.words[0] == "isotune" else 1])


def read_page(text: str | None = None) -> list[Row]:
    """All rows, in their order; an assertion names a line of a table that is no row."""
    rows, project = list[Row](), ""
    for line in (PAGE.read_text("utf-8") if text is None else text).splitlines():
        if line.startswith("## "):
            project = line[3:]
        if not line.startswith("|") or line.startswith(_HEAD):
            continue
        found = _ROW.match(line)
        assert found, f"not a row of a table: {line}"
        asked, command, leaves, test = found.groups()
        files = tuple(re.findall(r"`(runs/[^`]+)`", leaves))
        rows.append(Row(project, asked, tuple(shlex.split(command)), files, test))
    return rows


def resolve(words: tuple[str, ...] | list[str], made: dict[str, Any]) -> Any:
    """The recipe, or the arguments, of a command, by the parser that it has itself; UserError says what is wrong.

    `made` has the recipes of the rows above by their output_dir, to which a recipe is added.
    """
    program, *rest = words
    if program == "sbatch":
        missing = [word for word in rest if not word.startswith("-") and not (ROOT / word).is_file()]
        if missing:
            raise UserError(f"{missing[0]}: there is no such file")
        return rest
    if program != "isotune":
        raise UserError(f"{program} is not a command of the page")
    command, *rest = rest
    if command in TRAINING:
        _, rest = start.read_launch(rest)
        recipe = KINDS[command].read(recipe_words(command, rest, show=False), default_config=None, prog="isotune")
        made[recipe.output_dir] = recipe
        return recipe
    if command in ("eval", "chat"):
        run, *flags = rest
        module = evaluate_classifier if _made(run, made).task == "classification" else generate
        given = module.read_arguments(["--run_dir", run, *flags], prog="isotune", description="")
        if given.task is not None and not Path(given.task).is_file():
            raise UserError(f"--task {given.task}: there is no such task")
        return given
    if command == "predict":
        _made(rest[0], made)
        return predict.read_arguments(rest[1:])
    if command == "serve":
        _made(rest[0], made)
        return serve.read_arguments(rest)
    given = command_parser().parse_args([command, *rest])
    if given.run is plan_command.run:
        raise UserError("isotune plan needs a network for these recipes")
    runs = [*getattr(given, "runs", []), *([given.run_dir] if hasattr(given, "run_dir") else [])]
    for run in runs:
        _made(run, made)
    if command == "ensemble":
        made[given.output_dir] = made[runs[0]]
    return given


def _made(run: str, made: dict[str, Any]) -> Any:
    """The recipe of a run that a row above has made."""
    if run not in made:
        raise UserError(f"{run} is made by no row above")
    return made[run]
