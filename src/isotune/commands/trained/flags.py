"""The flags that the commands of a trained model share."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotune.io import shipped
from isotune.io.errors import OneSentenceParser, UserError, shown
from isotune.io.run_files import is_finite_number, or_empty, read_recipe_values


def model_parser(prog: str, description: str, kind: str) -> OneSentenceParser:
    """A parser with the flags for a run, or else for a model of a kind in words."""
    form = argparse.RawDescriptionHelpFormatter
    # whole names: `isotune eval` gives a run's own data unless it finds the flags that name others
    parser = OneSentenceParser(prog=prog, description=description, formatter_class=form, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", metavar="RUN", help="the folder of a finished run")
    source.add_argument("--model", metavar="NAME", help=f"or any {kind}: a folder or a Hub id")
    return parser


def add_data_flags(parser: Any) -> None:
    """Which part of a data set is read, of a parser or a group of one."""
    parser.add_argument(
        "--dataset_config", metavar="NAME", help="of a Hub id or folder that has several configurations"
    )
    parser.add_argument("--dataset_revision", metavar="NAME", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--dataset_columns", nargs="+", metavar="NAME", help="its columns, of a CSV file whose first line is a row"
    )


def add_launch_flags(parser: Any) -> None:
    """How long the processes of a launch wait for each other."""
    group = parser.add_argument_group("several processes")
    silence = "after so long without progress, or without a process's sign of life, all end (the run's own, or 1800)"
    group.add_argument("--ddp_timeout", type=int, metavar="SECONDS", help=silence)
    meeting = "they have so long to reach each other (the run's own, or 120)"
    group.add_argument("--rendezvous_timeout", type=float, metavar="SECONDS", help=meeting)


def timeouts_of(given: argparse.Namespace, run: str | None) -> dict[str, float]:
    """Those of the flags, else of the run's recipe; arguments of `start_ranks`."""
    names = ("ddp_timeout", "rendezvous_timeout")
    recipe = or_empty(read_recipe_values, Path(run)) if run else {}
    values = {name: getattr(given, name) if getattr(given, name) is not None else recipe.get(name) for name in names}
    for name, value in values.items():
        if value is not None and not (is_finite_number(value) and value > 0):
            raise UserError(f"{name} is {shown(value)}: it takes seconds above 0")
    return {name: value for name, value in values.items() if value is not None}


def find_task(given: argparse.Namespace) -> None:
    """Put the file of a shipped task in the place of its name."""
    if given.task:
        given.task = str(shipped.find(shipped.TASKS, given.task) or given.task)


def check_counts(given: argparse.Namespace, names: Sequence[str]) -> None:
    """UserError for the first of these flags that is below 1."""
    for name in names:
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name} is {getattr(given, name)}: it is at least 1")
