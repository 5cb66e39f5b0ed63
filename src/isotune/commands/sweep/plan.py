"""From the words of `isotune sweep` to its plan: the recipe of every trial, what is searched, and three sets of rows.

A trial trains on some rows, is chosen by others, and the winner is examined on a third set that neither has seen.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isotune.commands import start
from isotune.commands.sweep.space import Axis, split_flags
from isotune.commands.train import recipe_file
from isotune.config import RunRecipe, kind_of
from isotune.config.command_line import CommandLine
from isotune.config.engine_keys import evaluates
from isotune.config.layers import Layer, read_file
from isotune.config.recipes import ClassificationRecipe, project_of, task_of
from isotune.config.schema import Values
from isotune.config.task_types import HIGHER_IS_BETTER
from isotune.io import shipped
from isotune.io.errors import OneSentenceParser, UserError, nearest
from isotune.io.files import replace_file
from isotune.io.formats import format_of
from isotune.io.reading import read_json_object
from isotune.io.run_files import or_refuse

COMMANDS = {"sft": "sft", "classification": "classify"}
RECIPE_FILE, SEARCH_FILE = "sweep.yaml", "search.json"
SELECTION_SHARE = 0.1  # of the training rows, where the recipe's evaluation data are kept for the end
MOST_TRIALS, MOST_SEEDS = 10_000, 1_000


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that the search never sees, as keys of an evaluation task."""

    keys: dict[str, Any]

    @property
    def in_words(self) -> str:
        """`builtin:opinions (test)`."""
        return f"{self.keys['dataset_name']} ({self.keys['dataset_split']})"


@dataclass(frozen=True)
class Plan:
    """A sweep as its command line says it.

    Attributes:
        command: the command that runs a trial.
        recipe: that of trial 0, where nothing is searched.
        trials: how many are searched beside trial 0.
        launch: words of each run about its processes.
    """

    command: str
    folder: Path
    recipe: RunRecipe
    axes: list[Axis]
    trials: int
    seeds: list[int]
    test: HeldOutRows
    launch: list[str]

    @property
    def metric(self) -> str:
        """The metric that chooses."""
        return self.recipe.values["metric_for_best_model"] or "eval_loss"

    @property
    def higher_is_better(self) -> bool:
        """Its direction."""
        return self.metric in HIGHER_IS_BETTER

    @property
    def default(self) -> dict[str, Any]:
        """What trial 0 has for the searched keys."""
        return {axis.key: self.recipe.values[axis.key] for axis in self.axes}

    def contradiction(self, values: Values) -> str | None:
        """What is wrong with values of the searched keys together, or beside the others; None where nothing is."""
        try:
            self.recipe.with_values(**values)
        except UserError as error:
            return str(error)
        return None

    def as_dict(self) -> dict[str, Any]:
        """What decides the trials, as JSON has it; their number is left out, which may grow."""
        keys = type(self.recipe).keys()
        given = {name: value for name, value in self.recipe.given.items() if not keys[name].secret}
        content = {
            "command": self.command,
            "recipe": {name: value for name, value in given.items() if name != "output_dir"},
            "search": {axis.key: axis.as_dict() for axis in self.axes},
            "seeds": self.seeds,
            "test": self.test.keys,
        }
        return json.loads(json.dumps(content))

    def claim(self) -> None:
        """Write the plan into its folder, or find it there; UserError where another one, or something else, is."""
        file, content = self.folder / SEARCH_FILE, self.as_dict()
        if file.exists():
            there = or_refuse(read_json_object, file, f"{file}: cannot be read")
            if different := [name for name, value in content.items() if there.get(name) != value]:
                raise UserError(
                    f"{self.folder} holds another sweep, with another {_first_difference(there, content, different[0])}"
                    ": choose another --output_dir"
                )
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} is there and holds no sweep: choose another --output_dir")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made: {error.strerror}") from None
        head = "# The recipe of every trial, which sets the searched keys, the seed and output_dir.\n"
        text = yaml.safe_dump(content["recipe"], sort_keys=False, allow_unicode=True, width=1_000_000)
        replace_file(self.folder / RECIPE_FILE, head + text)
        replace_file(file, json.dumps(content, indent=2) + "\n")


def read_plan(argv: Sequence[str]) -> Plan:
    """The plan of a command line; UserError says what is wrong with it."""
    if not argv or argv[0].startswith("-"):
        raise UserError("isotune sweep: name a recipe first (`isotune ls` lists those that are shipped)")
    what, file = argv[0], recipe_file(argv[0])
    if file is None:
        near = nearest(what.removesuffix(".yaml"), shipped.names(shipped.RECIPES))
        raise UserError(
            f"{what} is no recipe and no run: {f'did you mean {near}?' if near else '`isotune ls` lists recipes'}"
        )
    given, rest = _own_flags(argv[1:])
    launch = [
        word
        for name in ("num_processes", "engine")
        if (value := getattr(given, name)) is not None
        for word in (f"--{name}", str(value))
    ]
    start.read_launch(launch)  # its mistakes before anything is written
    of_file, line = read_file(file), CommandLine.parse(rest)
    if line.config is not None:
        raise UserError(f"--config {line.config}: the recipe is named already, {what}")
    if project_of(of_file.given) is not None:
        raise UserError(f"{what} is a recipe of `isotune arena`, which a sweep does not run")
    task = task_of(of_file.given)
    if task is None:
        raise UserError(f"{what} says no task: add `task: sft` or `task: classification` to it")
    kind = kind_of({"task": task})
    keys = kind.keys()
    axes, fixed = split_flags(line.flags, keys)
    folder = Path(given.output_dir or f"{of_file.given.get('output_dir') or f'runs/{file.stem}'}_sweep").expanduser()
    recipe, test = _rows(what, kind, of_file, CommandLine(None, {**fixed, "output_dir": [str(folder)]}), given)
    for axis in axes:  # keys without an effect, and values that the recipe contradicts
        for value in axis.choices or (axis.low, axis.high):
            recipe.from_layers([Layer(recipe.given), Layer({axis.key: value}, flags=True)])
    if not axes:
        raise UserError("isotune sweep: nothing is searched: give a key a range (1e-5..1e-4) or a list (0,100)")
    if recipe.values["push_to_hub"]:
        recipe = recipe.with_values(push_to_hub=False)
    seeds = [recipe.seed + number for number in range(given.seeds)]
    return Plan(COMMANDS[task], folder, recipe, axes, given.trials, seeds, test, launch)


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


def _own_flags(argv: Sequence[str]) -> tuple[Any, list[str]]:
    given, rest = parser().parse_known_args(list(argv))
    for name, most in (("trials", MOST_TRIALS), ("seeds", MOST_SEEDS)):
        if not 1 <= getattr(given, name) <= most:
            raise UserError(f"--{name} is {getattr(given, name)}: it is from 1 to {most:,}")
    if given.test_dataset_split is not None and given.test_dataset_name is None:
        raise UserError("--test_dataset_split has no effect without --test_dataset_name")
    return given, rest


def _rows(
    what: str, kind: type[RunRecipe], of_file: Layer, flags: CommandLine, given: Any
) -> tuple[RunRecipe, HeldOutRows]:
    """The recipe of the trials, which evaluates on rows to choose by, and the test rows."""
    recipe = kind.from_layers([of_file, *flags.layers(kind.keys())])
    if not evaluates(recipe.values):
        raise UserError(
            f"{what}: there is no evaluation data to choose by: say --eval_dataset_name"
            f"{', or --eval_split_share' if kind is ClassificationRecipe else ''}, and no --eval_strategy no"
        )
    if given.test_dataset_name is not None:
        return recipe, _named_test(given.test_dataset_name, given.test_dataset_split or "test", recipe.values)
    words = dict(flags.flags)
    share = words.pop("eval_split_share", [str(SELECTION_SHARE)])
    own = kind.from_layers([of_file, *CommandLine(None, words).layers(kind.keys())])
    name = own.values["eval_dataset_name"]
    if kind is not ClassificationRecipe or name is None or own.values["eval_dataset_mixture"] is not None:
        raise UserError(f"{what}: no rows are left that the search does not see: name test rows by --test_dataset_name")
    test = {"dataset_name": name, "dataset_split": own.values["eval_dataset_split"], **_of_hub(own.values, "eval_")}
    return own.with_values(eval_split_share=share[0]), HeldOutRows(test)


def _named_test(name: str, split: str, values: Values) -> HeldOutRows:
    """The rows that the command line names; UserError where the search sees them."""
    for prefix, role in (("", "trains on"), ("eval_", "chooses by")):
        is_same = name == values[f"{prefix}dataset_name"]
        if is_same and (split == values[f"{prefix}dataset_split"] or format_of(name) is not None):
            raise UserError(f"--test_dataset_name {name}: the search {role} these rows, and the test needs others")
    of_hub = _of_hub(values, "") if name == values["dataset_name"] else {}
    return HeldOutRows({"dataset_name": name, "dataset_split": split, **of_hub})


def _of_hub(values: Values, prefix: str) -> dict[str, Any]:
    """Configuration and revision of a data set of the recipe, as keys of a task."""
    names = ("config", "revision")
    return {f"dataset_{name}": value for name in names if (value := values[f"{prefix}dataset_{name}"]) is not None}


def _first_difference(there: dict[str, Any], here: dict[str, Any], name: str) -> str:
    """What differs first, by its key."""
    one, other = there.get(name), here[name]
    if not isinstance(one, dict) or not isinstance(other, dict):
        return name
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return f"{keys[0]} ({name})" if keys else name
