"""`isotune sft | classify | arena`: from the words that a user typed to a recipe, and from it to a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.commands import start
from isotune.commands.sft import read_sft_recipe, train_sft
from isotune.config.command_line import CommandLine
from isotune.config.run_recipe import RESUME_NEWEST, RunRecipe
from isotune.config.schema import ADAPTER
from isotune.io import shipped
from isotune.io.errors import UserError, nearest
from isotune.io.formats import FORMAT_WORDS, base_name, format_of
from isotune.io.parent_process import is_launched
from isotune.io.run_files import RECIPE

RECIPE_ENDS = (".yaml", ".yml")
USAGE = """usage: isotune {command} RECIPE | RUN | DATA [--num_processes N] [--engine NAME] [--KEY VALUE ...]

  RECIPE           a file, or the name of a shipped one (`isotune ls`; `isotune cp NAME mine.yaml` to change it)
  RUN              the folder of a run, which goes on from its newest checkpoint
  DATA             a file, a folder, a Hub id or builtin:NAME
  --num_processes  processes to start (one for each GPU, or one on the CPU)
  --engine         single, ddp, zero1, zero2, zero3, zero3_offload, fsdp2, or a file for accelerate launch

Or the recipe's keys alone:
"""


@dataclass(frozen=True)
class Kind:
    """A command that trains.

    Attributes:
        read: the recipe of a command line, with keyword arguments `default_config` and `prog`.
        train: the run of such a recipe.
        defaults: flags for a data set that is named instead of a recipe, where the command line says nothing else.
    """

    read: Callable[..., Any]
    train: Callable[[Any], None]
    defaults: Mapping[str, str]


def _read_classification(argv: Sequence[str], *, default_config: Path | None, prog: str) -> Any:
    from isotune.commands.classification import read_classification_recipe

    what = "Classification of texts, unpadded and exact."
    return read_classification_recipe(argv, default_config=default_config, prog=prog, description=what)


def _train_classification(recipe: Any) -> None:
    from isotune.commands.classification import train_classifier

    train_classifier(recipe, tests_chance=recipe.label_source != "column")


def _read_arena(argv: Sequence[str], *, default_config: Path | None, prog: str) -> Any:
    from isotune.commands.arena import read_arena_recipe

    shipped_recipe = shipped.ROOT / shipped.RECIPES / "arena_bert.yaml"
    return read_arena_recipe(argv, default_config=default_config or shipped_recipe, prog=prog)


def _train_arena(recipe: Any) -> None:
    from isotune.commands.arena import train_arena

    train_arena(recipe)


KINDS = {
    "sft": Kind(read_sft_recipe, train_sft, {"model_name_or_path": "facebook/opt-350m"}),
    "classify": Kind(
        _read_classification,
        _train_classification,
        {"model_name_or_path": "distilbert/distilbert-base-uncased", "tune": "full", "eval_split_share": "0.1"},
    ),
    "arena": Kind(_read_arena, _train_arena, {}),
}


def run(command: str, argv: Sequence[str]) -> int | None:
    """`isotune COMMAND ARGV`: read the recipe, then run it here or on the processes of a launch."""
    launch, rest = start.read_launch(argv)
    if {"-h", "--help", "--help-all", "--help_all"} & set(argv) and not is_launched():
        print(USAGE.format(command=command))
    words = recipe_words(command, rest, show=not is_launched())
    recipe = KINDS[command].read(words, default_config=None, prog=f"isotune {command}")
    if launch.file is not None:
        return start.run_launched([command, *words], launch)
    KINDS[command].train(recipe)
    return None


def recipe_words(command: str, argv: Sequence[str], *, show: bool) -> list[str]:
    """The flags that `[WHAT] FLAGS` stands for: WHAT is a recipe's file or name, a run's folder, or a data set.

    A run goes on in its own folder, wherever that is now and however it began. A data set brings the command's
    defaults, which are printed where `show`. UserError: WHAT is none of these.
    """
    if not argv and command != "arena":
        raise UserError(f"isotune {command}: name a recipe, a data file or flags (`isotune ls` lists the recipes)")
    if not argv or argv[0].startswith("-"):
        return list(argv)
    what, flags = argv[0], list(argv[1:])
    line = CommandLine.parse(flags)
    if file := recipe_file(what):
        if line.config is not None:
            raise UserError(f"--config {line.config}: the recipe is named already, {what}")
        own = {"output_dir": what, "resume": RESUME_NEWEST} if Path(what).is_dir() else {}
        return ["--config", str(file), *flags, *_words({k: v for k, v in own.items() if k not in line.flags})]
    if not _is_data(what):
        near = nearest(what.removesuffix(".yaml"), shipped.names(shipped.RECIPES))
        hint = f"did you mean {near}?" if near else "`isotune ls` lists the recipes"
        raise UserError(f"{what} is no recipe, no run, and no data ({FORMAT_WORDS}; a folder; a Hub id): {hint}")
    if (other := line.flags.get("dataset_name")) is not None:
        raise UserError(f"--dataset_name {' '.join(other)}: the data set is named already, {what}")
    return ["--dataset_name", what, *flags, *_defaults(command, what, line, show=show)]


def recipe_file(what: str) -> Path | None:
    """The recipe of a file, of a run's folder or of a shipped name; None where `what` is none of these."""
    path = Path(what)
    if path.is_dir() and (path / RECIPE).is_file():
        return path / RECIPE
    if path.suffix in RECIPE_ENDS or not path.exists():
        return shipped.find(shipped.RECIPES, what)
    return None


def _is_data(what: str) -> bool:
    is_hub_id = what.count("/") == 1 and not what.startswith((".", "/", "~")) and not what.endswith(RECIPE_ENDS)
    return what.startswith("builtin:") or format_of(what) is not None or Path(what).is_dir() or is_hub_id


def _defaults(command: str, what: str, line: CommandLine, *, show: bool) -> list[str]:
    """The command's flags for a data set, without those that the flags or their --config give, and a place for the run.

    UserError where that file cannot be read.
    """
    if {"help", "help_all"} & line.flags.keys():
        return []
    given = {name for name, value in line.given().items() if value is not None}
    name = Path(base_name(what.removeprefix("builtin:").rstrip("/"))).stem
    wanted = {**KINDS[command].defaults, "output_dir": f"runs/{name}"}
    if given & {"eval_dataset_name", "eval_dataset_mixture", "eval_strategy"}:
        wanted.pop("eval_split_share", None)
    if given & {name for name, key in RunRecipe.keys().items() if key.group == ADAPTER}:
        wanted.pop("tune", None)  # what is said of an adapter asks for one
    added = {key: value for key, value in wanted.items() if key not in given}
    if show and added:
        chosen = " ".join(f"--{key} {value}" for key, value in added.items())
        print(f"chosen      {chosen}", flush=True)
    return _words(added)


def _words(values: Mapping[str, str]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", value)]
