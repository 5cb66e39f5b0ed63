"""The flags of `isotune sweep` that are no keys of a recipe."""

from collections.abc import Sequence
from typing import Any

from isotune.io.errors import OneSentenceParser, UserError

MOST_TRIALS, MOST_SEEDS = 10_000, 1_000
LAUNCH = ("num_processes", "engine")


def parser() -> OneSentenceParser:
    """The flags of a sweep itself."""
    own = OneSentenceParser(prog="isotune sweep", allow_abbrev=False, add_help=False)
    for name, default, what in (
        ("trials", 20, "values to try, beside the recipe's own (%(default)s)"),
        ("seeds", 3, "runs of each trial (%(default)s)"),
        ("num_processes", None, "processes of each run, as of `isotune sft`"),
    ):
        own.add_argument(*_spellings(name), type=int, default=default, metavar="N", help=what)
    for name, what in (
        ("engine", "of each run, as of `isotune sft`"),
        ("output_dir", "folder of the sweep (that of the recipe, and _sweep)"),
        ("test_dataset_name", "test rows, for the winner alone (of a classifier the recipe's evaluation data)"),
        ("test_dataset_split", "split of it (test)"),
    ):
        own.add_argument(*_spellings(name), metavar="NAME", help=what)
    return own


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def read_flags(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """A sweep's own flags, and the other words; UserError for a number out of range."""
    given, rest = parser().parse_known_args(list(argv))
    for name, most in (("trials", MOST_TRIALS), ("seeds", MOST_SEEDS)):
        if not 1 <= getattr(given, name) <= most:
            raise UserError(f"--{name} is {getattr(given, name)}: it is from 1 to {most:,}")
    if given.test_dataset_split is not None and given.test_dataset_name is None:
        raise UserError("--test_dataset_split has no effect without --test_dataset_name")
    return given, rest


def launch_words(given: Any) -> list[str]:
    """The flags about the processes of each run, as `isotune sft` takes them."""
    values = {name: getattr(given, name) for name in LAUNCH}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
