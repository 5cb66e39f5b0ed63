"""The flags of `isotune sweep` that are no keys of a recipe."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isotune.io import shipped
from isotune.io.errors import OneSentenceParser, UserError, shown

MOST_TRIALS, MOST_SEEDS, MOST_PARALLEL = 10_000, 1_000, 1_000
LAUNCH = ("num_processes", "engine")


@dataclass(frozen=True)
class JobOptions:
    """How jobs are submitted: further options of sbatch, and the engine of their runs; None: as many processes need."""

    sbatch: list[str]
    engine: str | None = None


def parser() -> OneSentenceParser:
    """The flags of a sweep itself."""
    own = OneSentenceParser(prog="isotune sweep", allow_abbrev=False, add_help=False)
    for name, default, what in (
        ("trials", 20, "values to try, beside the recipe's own (%(default)s)"),
        ("seeds", 3, "runs of each trial (%(default)s)"),
        ("parallel", 1, "trials that are proposed together, and runs at once on this machine (%(default)s)"),
        ("num_processes", None, "processes of each run, as of `isotune sft`"),
    ):
        own.add_argument(*_spellings(name), type=int, default=default, metavar="N", help=what)
    for name, what in (
        ("engine", "of each run, as of `isotune sft`"),
        ("output_dir", "folder of the sweep (that of the recipe, and _sweep)"),
        ("test_dataset_name", "test rows, for the winner alone (of a classifier the recipe's evaluation data)"),
        ("test_dataset_split", "split of it (test)"),
        ("sbatch", "options of sbatch for the jobs of --slurm, in one text: '--partition gpu --time 2:00:00'"),
    ):
        own.add_argument(*_spellings(name), metavar="NAME", help=what)
    own.add_argument("--pruning", action="store_true", help="the worse half of a generation ends at an evaluation")
    own.add_argument("--slurm", action="store_true", help="the runs are jobs of this cluster")
    return own


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def read_flags(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """A sweep's own flags, and the other words; UserError for a number out of range."""
    given, rest = parser().parse_known_args(list(argv))
    for name, most in (("trials", MOST_TRIALS), ("seeds", MOST_SEEDS), ("parallel", MOST_PARALLEL)):
        if not 1 <= getattr(given, name) <= most:
            raise UserError(f"--{name} is {getattr(given, name)}: it is from 1 to {most:,}")
    if given.test_dataset_split is not None and given.test_dataset_name is None:
        raise UserError("--test_dataset_split has no effect without --test_dataset_name")
    if given.pruning and given.parallel == 1:
        raise UserError("--pruning ends the worse half of the trials that are proposed together: say --parallel too")
    if given.sbatch is not None and not given.slurm:
        raise UserError("--sbatch has no effect without --slurm")
    if given.slurm and given.num_processes is not None:
        raise UserError("--num_processes is not for --slurm: a job has a process a GPU (--sbatch '--gpus-per-node 4')")
    return given, rest


def launch_words(given: Any) -> list[str]:
    """The flags about the processes of each run, as `isotune sft` takes them."""
    values = {name: getattr(given, name) for name in LAUNCH}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def job_options(given: Any) -> JobOptions | None:
    """How the jobs of `--slurm` are submitted; None where the runs are processes of this machine."""
    if not given.slurm:
        return None
    engines = shipped.names(shipped.ENGINES)
    if given.engine is not None and given.engine not in engines:
        raise UserError(f"--engine {given.engine}: a job takes {', '.join(engines)}")
    try:
        return JobOptions(shlex.split(given.sbatch or ""), given.engine)
    except ValueError as error:
        raise UserError(f"--sbatch {shown(given.sbatch, 80)}: {error}") from None
