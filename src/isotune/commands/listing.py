"""`isotune ls` and `isotune cp`: what a wheel carries and what is here already, and a copy of a recipe to change."""

import re
from collections.abc import Iterator
from pathlib import Path

from isotune.commands.runs import best_metric, printable, progress
from isotune.config.layers import read_file
from isotune.io import shipped
from isotune.io.errors import UserError, did_you_mean
from isotune.io.files import replace_file
from isotune.run.run_state import find_runs, state_of_run

KINDS = ("recipes", "tasks", "engines", "models", "runs")
COPIED = (shipped.RECIPES, shipped.TASKS, shipped.ENGINES)
_COMMAND = re.compile(r"(?:accelerate launch|python) (?P<script>train/\w+\.py)(?: --config train/configs/[\w.-]+)?")


def list_all(kinds: list[str], runs: Path) -> None:
    """Print the tables of these kinds, or of all; `runs` is the folder whose runs are listed."""
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"isotune ls {kind}: there is no such list{did_you_mean(kind, KINDS)}")
    tables = {
        "recipes": (f"Recipes (isotune sft | classify NAME; {shipped.RECIPES})", _described(shipped.RECIPES)),
        "tasks": (f"Evaluation tasks (isotune eval RUN --task NAME; {shipped.TASKS})", _described(shipped.TASKS)),
        "engines": (f"Engines (--engine NAME; {shipped.ENGINES})", _described(shipped.ENGINES)),
        "models": ("Models of the recipes and in the Hub's cache", _models()),
        "runs": (f"Runs in {runs}", _runs(runs)),
    }
    for kind in kinds or KINDS:
        title, rows = tables[kind]
        print(f"{title}:")
        lines = list(rows)
        width = max((len(name) for name, _ in lines), default=0)
        print("\n".join(f"  {name:<{width}}  {what}".rstrip() for name, what in lines) or "  none")


def copy_shipped(name: str, target: str | None) -> Path:
    """Copy a shipped recipe, task or engine to a new file, with the command of its head for that file; where it is.

    UserError: there is none of that name, or the file exists.
    """
    source = next((file for folder in COPIED if (file := _find(folder, name))), None)
    if source is None:
        raise UserError(f"isotune cp {name}: there is no such recipe, task or engine{did_you_mean(name, _all_names())}")
    file = Path(target or source.name)
    if file.exists():
        raise UserError(f"isotune cp {name}: {file} exists, and is left as it is: name another file")
    text = source.read_text(encoding="utf-8")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, _COMMAND.sub(lambda found: f"{shipped.COMMANDS[found['script']]} {file}", text))
    except OSError as error:
        raise UserError(f"isotune cp {name}: {file} cannot be written: {error.strerror}") from None
    return file


def _find(folder: str, name: str) -> Path | None:
    """A shipped file by its name alone, and no file of the user's."""
    stem = name.removesuffix(".yaml")
    return shipped.ROOT / folder / f"{stem}.yaml" if stem in shipped.names(folder) else None


def _all_names() -> list[str]:
    return [name for folder in COPIED for name in shipped.names(folder)]


def _described(folder: str) -> Iterator[tuple[str, str]]:
    """Each shipped file of a folder with the first line of its head."""
    for name in shipped.names(folder):
        with (shipped.ROOT / folder / f"{name}.yaml").open(encoding="utf-8") as file:
            yield name, file.readline().lstrip("# ").rstrip()


def _models() -> Iterator[tuple[str, str]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    used: dict[str, list[str]] = {}
    for name in shipped.names(shipped.RECIPES):
        model = read_file(shipped.ROOT / shipped.RECIPES / f"{name}.yaml").given.get("model_name_or_path")
        if model and not model.startswith("runs/"):
            used.setdefault(str(model), []).append(name)
    cached = {folder.name[8:].replace("--", "/", 1) for folder in Path(HF_HUB_CACHE).glob("models--*")}
    for model in sorted({*used, *cached}):
        here = "in the cache" if model in cached else "built in" if model.startswith("builtin:") else "not downloaded"
        yield model, f"{here:<14}  {', '.join(used.get(model, ()))}"


def _runs(folder: Path) -> Iterator[tuple[str, str]]:
    """Every run below `folder`, with its task, its state, and its best evaluation."""
    for run in find_runs([folder]) if folder.is_dir() else ():
        state = state_of_run(run)
        ended = f"{state.state} at step {progress(state)}"
        yield printable(str(run)), printable(f"{state.task or '?':<14}  {ended:<26}  {best_metric(state)}")
