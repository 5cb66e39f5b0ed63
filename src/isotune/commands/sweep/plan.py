"""From the words of `isotune sweep` to its plan: the recipe of every trial, what is searched, and the test rows.

The plan is written into the sweep's folder before the first run, and holds for every call that goes on there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isotune.commands import start
from isotune.commands.sweep.flags import JobOptions, job_options, launch_words, read_flags
from isotune.commands.sweep.processes import shares_of
from isotune.commands.sweep.rows import HeldOutRows, choose_rows
from isotune.commands.sweep.space import Axis, split_flags
from isotune.commands.train import recipe_file
from isotune.config import RunRecipe, kind_of
from isotune.config.command_line import CommandLine
from isotune.config.layers import Layer, read_file
from isotune.config.recipes import project_of, task_of
from isotune.config.schema import Values
from isotune.config.task_types import HIGHER_IS_BETTER
from isotune.io import shipped
from isotune.io.errors import UserError, nearest
from isotune.io.files import replace_file
from isotune.io.parent_process import is_launched
from isotune.io.reading import read_json_object
from isotune.io.run_files import or_refuse

COMMANDS = {"sft": "sft", "classification": "classify"}
RECIPE_FILE, SEARCH_FILE = "sweep.yaml", "search.json"


@dataclass(frozen=True)
class Plan:
    """A sweep as its command line says it.

    Attributes:
        command: the command that runs a trial.
        recipe: that of trial 0, where nothing is searched.
        trials: how many are searched beside trial 0.
        launch: words of each run about its processes.
        parallel: trials of a generation, which are proposed together; so many runs at once on this machine.
        pruning: whether the worse half of a generation ends at an evaluation.
        jobs: how runs are submitted to a cluster; None where they are processes of this machine.
    """

    command: str
    folder: Path
    recipe: RunRecipe
    axes: list[Axis]
    trials: int
    seeds: list[int]
    test: HeldOutRows
    launch: list[str]
    parallel: int = 1
    pruning: bool = False
    jobs: JobOptions | None = None

    @property
    def metric(self) -> str:
        """The metric that chooses."""
        return self.recipe.values["metric_for_best_model"] or "eval_loss"

    @property
    def higher_is_better(self) -> bool:
        """Its direction."""
        return self.metric in HIGHER_IS_BETTER

    @property
    def logs(self) -> Path:
        """The folder for what runs print that have no terminal."""
        return self.folder / "logs"

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
        content = {
            "command": self.command,
            "recipe": {name: value for name, value in self.recipe.given.items() if name != "output_dir"},
            "search": {axis.key: axis.as_dict() for axis in self.axes},
            "seeds": self.seeds,
            "parallel": self.parallel,
            "pruning": self.pruning,
            "test": self.test.keys,
        }
        return json.loads(json.dumps(content))

    def claim(self) -> None:
        """Write the plan into its folder, or find it there; UserError where another one, or something else, is."""
        file, content = self.folder / SEARCH_FILE, self.as_dict()
        if file.exists():
            there = {"parallel": 1, "pruning": False} | or_refuse(read_json_object, file, f"{file}: cannot be read")
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
    if is_launched():
        raise UserError("isotune sweep starts the processes of its runs itself: start it without a launcher")
    if not argv or argv[0].startswith("-"):
        raise UserError("isotune sweep: name a recipe first (`isotune ls` lists those that are shipped)")
    what, file = argv[0], recipe_file(argv[0])
    if file is None:
        near = nearest(what.removesuffix(".yaml"), shipped.names(shipped.RECIPES))
        hint = f"did you mean {near}?" if near else "`isotune ls` lists the recipes"
        raise UserError(f"{what} is no recipe and no run: {hint}")
    given, rest = read_flags(argv[1:])
    launch = launch_words(given)
    start.read_launch(launch)  # its mistakes before anything is written
    jobs = job_options(given)
    if jobs is None:
        shares_of(given.parallel, launch)
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
    line.answer_help(keys, None, f"isotune sweep {what}", "The keys of the recipe; a sweep has its own flags beside.")
    axes, fixed = split_flags(line.flags, keys)
    beside = str(of_file.given.get("output_dir") or f"runs/{file.stem}").rstrip("/")
    folder = Path(given.output_dir or f"{beside}_sweep").expanduser()
    flags = CommandLine(None, {**fixed, "output_dir": [str(folder)]})
    named = given.test_dataset_name and (given.test_dataset_name, given.test_dataset_split or "test")
    recipe, test = choose_rows(what, kind, of_file, flags, named or None)
    for axis in axes:  # keys without an effect, and values that the recipe contradicts
        for value in axis.choices or (axis.low, axis.high):
            recipe.from_layers([Layer(recipe.given), Layer({axis.key: value}, flags=True)])
    if not axes:
        raise UserError("isotune sweep: nothing is searched: give a key a range (1e-5..1e-4) or a list (0,100)")
    if recipe.values["push_to_hub"]:  # trials are not uploaded, and a token is not written
        recipe = recipe.with_values(push_to_hub=False)
    seeds = [recipe.seed + number for number in range(given.seeds)]
    shared = COMMANDS[task], folder, recipe, axes, given.trials, seeds, test, launch
    return Plan(*shared, parallel=given.parallel, pruning=given.pruning, jobs=jobs)


def _first_difference(there: dict[str, Any], here: dict[str, Any], name: str) -> str:
    """What differs first, by its key."""
    one, other = there.get(name), here[name]
    if not isinstance(one, dict) or not isinstance(other, dict):
        return name
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return f"{keys[0]} ({name})" if keys else name
