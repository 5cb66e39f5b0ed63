"""`isotune slurm`: write the batch file of a run or an evaluation for SLURM, and submit it.

The file is a shipped one with this job's resources and command, so it behaves as `sbatch slurm/yelp.sbatch` does from a
checkout: it stops before the time limit with a checkpoint, is requeued, and goes on.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from isotune.commands import train
from isotune.config.unsupported_keys import TOKEN_NAMES, UNSUPPORTED
from isotune.io import shipped
from isotune.io.errors import OneSentenceParser, RunFault, UserError
from isotune.io.extras import need
from isotune.io.files import replace_file
from isotune.io.reading import Unreadable, read_text

TEMPLATES = {"sft": "sft_opt.sbatch", "classify": "yelp.sbatch", "arena": "yelp.sbatch", "eval": "eval.sbatch"}
PROGRAM = "isotune.cli"
OF_CLUSTER = ("SLURM_CONF", "SLURM_JWT")  # how the commands of Slurm find it and say who asks


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The job's own flags, and the words of the command that the job runs."""
    parser = OneSentenceParser(
        prog="isotune slurm",
        allow_abbrev=False,
        description="Write a batch file, and submit it; the other flags are those of the command.",
        usage="isotune slurm sft|classify|arena|eval WHAT [--nodes N] [--engine NAME] [--dry-run] [FLAGS]",
        epilog="examples:\n  isotune slurm classify mine.yaml --nodes 2 --gpus_per_node 4\n"
        "  isotune slurm sft chats.jsonl --time 02:00:00 --learning_rate 1e-4 --dry-run\n"
        "  isotune slurm eval runs/mine --partition cpu --gpus_per_node 0 --processes_per_node 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=TEMPLATES, help="what the job runs")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (%(default)s)")
    parser.add_argument("--gpus_per_node", type=int, default=1, metavar="N", help="GPUs of each (%(default)s)")
    of_cpus = "processes of each node without GPUs (%(default)s)"
    parser.add_argument("--processes_per_node", type=int, default=1, metavar="N", help=of_cpus)
    parser.add_argument("--cpus_per_task", type=int, default=8, metavar="N", help="cores (%(default)s)")
    parser.add_argument("--engine", help="as of `isotune sft` (single for one process, else ddp)")
    for name in ("time", "partition", "account"):
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"as sbatch takes --{name}")
    parser.add_argument("--batch_file", metavar="FILE", help="the file to write (COMMAND-NAME.sbatch)")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the file: write and submit nothing")
    given, rest = parser.parse_known_args(list(argv))
    for name in ("nodes", "processes_per_node", "cpus_per_task"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} is {getattr(given, name)}: it is at least 1")
    if given.gpus_per_node < 0:
        raise UserError(f"--gpus_per_node is {given.gpus_per_node}: it is 0 or more")
    if given.gpus_per_node and given.processes_per_node > 1:
        raise UserError("--processes_per_node is for nodes without GPUs: say --gpus_per_node 0 with it")
    return given, rest


def run(argv: Sequence[str]) -> None:
    """`isotune slurm ARGV`: the command's mistakes are answered before anything is written."""
    given, rest = read_arguments(argv)
    words, name = _checked_words(given.command, rest)
    file = Path(given.batch_file or f"{given.command}-{name}.sbatch")
    text = batch_file(given, words, file)
    if given.dry_run:
        print(text, end="")
        return
    if _holds_another(file, text):
        raise UserError(f"{file} exists and differs: submit it by `{_submits(file)}`, or name another --batch_file")
    require_sbatch(", or say --dry-run")
    try:
        replace_file(file, text)
    except OSError as error:
        raise UserError(f"--batch_file {file} cannot be written: {error.strerror}") from error
    print(f"batch file  {file}", flush=True)
    print(submit([str(file)]))


def require_sbatch(otherwise: str = "") -> None:
    """UserError where there is no sbatch; `otherwise` says what else there is to do."""
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not found: run this on a login node of the cluster{otherwise}")


def submit(words: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """What `sbatch WORDS` prints, with these variables beside those of this process; RunFault where it fails.

    The job inherits nothing of a job that this process may be in, such as how often that was restarted.
    """
    in_job = "SLURM_JOB_ID" in os.environ
    kept = {k: v for k, v in os.environ.items() if not (in_job and k.startswith("SLURM_")) or k in OF_CLUSTER}
    environment = {**kept, **(variables or {})}
    # in a session of its own: a Ctrl-C that ended it could leave a job that nobody knows
    done = subprocess.run(
        ["sbatch", *words], check=False, capture_output=True, text=True, env=environment, start_new_session=True
    )
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise RunFault(f"sbatch {shlex.join(words)} failed: {said}")
    return done.stdout.strip()


def _holds_another(file: Path, text: str) -> bool:
    """Whether there is a text file of that name with another text; UserError where it is none."""
    try:
        return read_text(file) != text
    except FileNotFoundError:
        return False
    except Unreadable as reason:
        raise UserError(f"{reason.of(f'--batch_file {file}')}; name another file") from None


def _checked_words(command: str, argv: Sequence[str]) -> tuple[list[str], str]:
    """The words after `isotune COMMAND` that the job runs, read once here, and the job's name."""
    if command == "eval":
        if not argv or argv[0].startswith("-"):
            raise UserError("isotune slurm eval: name a run first")
        for flag in (word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")):
            if flag in TOKEN_NAMES:  # which the job alone would refuse, when the batch file holds it
                raise UserError(f"--{flag} is not a flag here: {UNSUPPORTED[flag]}")
        return list(argv), Path(argv[0]).name
    with contextlib.redirect_stdout(sys.stderr):  # stdout may be the batch file
        words = train.recipe_words(command, argv, show=True)
    recipe = train.KINDS[command].read(words, default_config=None, prog=f"isotune slurm {command}")
    return words, Path(recipe.output_dir).name


def batch_file(given: argparse.Namespace, words: Sequence[str], file: Path) -> str:
    """The text of the batch file: the shipped one's resources with these of the job, and the line that launches."""
    processes = given.nodes * (given.gpus_per_node or given.processes_per_node)
    engine = _shipped_engine(given.engine or ("single" if processes == 1 else "ddp"))
    if engine == "single" and processes > 1:
        raise UserError(f"--engine single is one process, and the job has {processes}: say --engine ddp")
    if engine.startswith("zero"):
        need("deepspeed", f"--engine {engine}")
    template = (shipped.ROOT / shipped.BATCH_FILES / TEMPLATES[given.command]).read_text(encoding="utf-8")
    options = {
        "job-name": re.sub(r"[^\w.-]+", "-", f"isotune-{file.stem}"),  # sbatch ends a value at a space
        "nodes": given.nodes,
        "ntasks-per-node": given.processes_per_node,
        "gpus-per-node": given.gpus_per_node,
        "cpus-per-task": given.cpus_per_task,
        **{name: getattr(given, name) for name in ("time", "partition", "account") if getattr(given, name)},
    }
    kept = [line for line in re.findall(r"^#SBATCH --.*", template, re.MULTILINE) if _option(line) not in options]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Written by `isotune slurm {given.command}`; submit it again with: {_submits(file)}",
            "# It is requeued when it is stopped, and goes on from its newest checkpoint.",
            *(f"#SBATCH --{name}={value}" for name, value in options.items()),
            *kept,
            "",
            f"export ISOTUNE_FILES={shlex.quote(str(shipped.ROOT))} ENGINE=${{ENGINE:-{engine}}}",
            *_environment(),
            '. "$ISOTUNE_FILES/slurm/launch.sh" || exit 2',
            f"launch -m {PROGRAM} {given.command} {shlex.join(words)}",
            "",
        ]
    )


def _submits(file: Path) -> str:
    return shlex.join(["sbatch", str(file)])


def _shipped_engine(name: str) -> str:
    """The name of the shipped engine that a user names by it or by its file: launch.sh takes no other."""
    file, names = shipped.require(shipped.ENGINES, name, "--engine").resolve(), shipped.names(shipped.ENGINES)
    if file.stem not in names or file != (shipped.ROOT / shipped.ENGINES / f"{file.stem}.yaml").resolve():
        raise UserError(f"--engine {name} is a file of your own: a job takes {', '.join(names)}")
    return file.stem


def _option(line: str) -> str:
    return line.removeprefix("#SBATCH --").partition("=")[0].partition(" ")[0]


def _environment() -> list[str]:
    """The line that names the environment that this command runs in, unless the user names one at submission."""
    named = '[ -n "${ISOTUNE_VENV:-}${ISOTUNE_CONDA:-}${ISOTUNE_CONTAINER:-}" ] || '
    return [f"{named}export {name}={shlex.quote(value)}" for name, value in python_environment({}).items()]


def python_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that names this command's Python to a job, where `environment` names none (slurm/environment.sh)."""
    if any(environment.get(name) for name in ("ISOTUNE_VENV", "ISOTUNE_CONDA", "ISOTUNE_CONTAINER")):
        return {}
    if sys.prefix != sys.base_prefix and Path(sys.prefix, "bin", "activate").is_file():
        return {"ISOTUNE_VENV": sys.prefix}
    conda = os.environ.get("CONDA_PREFIX")
    return {"ISOTUNE_CONDA": conda} if conda else {}
