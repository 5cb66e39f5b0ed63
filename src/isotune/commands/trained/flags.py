"""The flags that the commands of a trained model share."""

import argparse
from collections.abc import Sequence
from typing import Any

from isotune.io import shipped
from isotune.io.errors import OneSentenceParser, UserError


def model_parser(prog: str, description: str, kind: str) -> OneSentenceParser:
    """A parser with the flags for a run, or else for a model of a kind in words."""
    parser = OneSentenceParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def find_task(given: argparse.Namespace) -> None:
    """Put the file of a shipped task in the place of its name."""
    if given.task:
        given.task = str(shipped.find(shipped.TASKS, given.task) or given.task)


def check_counts(given: argparse.Namespace, names: Sequence[str]) -> None:
    """UserError for the first of these flags that is below 1."""
    for name in names:
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name} is {getattr(given, name)}: it is at least 1")
