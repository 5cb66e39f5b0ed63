"""The files that a checkout has at its top and a wheel carries: recipes, launch files, evaluation tasks, batch files.

setup.py copies them into a wheel as isotune/_files. In a checkout they are read where they stand, and messages name
the scripts and files there; from a wheel they name the commands that do the same.
"""

from pathlib import Path

from isotune.io.errors import UserError, did_you_mean

_IN_WHEEL = Path(__file__).resolve().parents[1] / "_files"
IS_CHECKOUT = not _IN_WHEEL.is_dir()
ROOT = Path(__file__).resolve().parents[3] if IS_CHECKOUT else _IN_WHEEL

RECIPES, ENGINES, TASKS, BATCH_FILES = "train/configs", "accelerate_configs", "eval/configs", "slurm"

COMMANDS = {
    "train/sft_opt.py": "isotune sft",
    "train/yelp.py": "isotune classify",
    "train/imdb.py": "isotune classify",
    "train/prompts.py": "isotune classify",
    "train/arena.py": "isotune arena",
    "eval/classify.py": "isotune eval",
    "eval/generate.py": "isotune eval",
}


def names(folder: str) -> list[str]:
    """The names of the YAML files in one of the shipped folders, without their ends."""
    return sorted(file.stem for file in (ROOT / folder).glob("*.yaml"))


def find(folder: str, name: str) -> Path | None:
    """The file that a user names: a path, or the name of a shipped one with or without .yaml; None where it is none."""
    if Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(".yaml")
    return ROOT / folder / f"{stem}.yaml" if stem in names(folder) else None


def require(folder: str, name: str, what: str) -> Path:
    """As `find`; UserError that begins with `what` where there is no such file."""
    file = find(folder, name)
    if file is None:
        near = did_you_mean(name.removesuffix(".yaml"), names(folder))
        raise UserError(f"{what} {name!r} is neither a file nor a name of a shipped one{near}")
    return file


def path(name: str) -> str:
    """How this user names a shipped file: as in the checkout, or by where the wheel has it."""
    return name if IS_CHECKOUT else str(ROOT / name)


def script(path: str) -> str:
    """How this user starts a script of the checkout: `eval/classify.py`, or `isotune eval` from a wheel."""
    return path if IS_CHECKOUT else COMMANDS[path]


def engine(name: str) -> str:
    """How this user names a shipped engine: by its launch file, or by `--engine` from a wheel."""
    return f"--config_file {ENGINES}/{name}.yaml" if IS_CHECKOUT else f"--engine {name}"
