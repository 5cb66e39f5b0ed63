"""The request of `isotune plan`: a recipe and a launch, read to the end even where they are wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from isotune.config import RunRecipe
from isotune.config.command_line import CommandLine
from isotune.config.recipes import TASKS, project_of, task_of
from isotune.io.errors import UserError, did_you_mean
from isotune.models.opening import load_config
from isotune.models.supervised_loss import PLAIN_HEADS
from isotune.preflight.launches import Launch, read_launch


@dataclass(frozen=True)
class Asked:
    """A recipe and its launch.

    Attributes:
        problems: every mistake in them, each a sentence.
        guess: the sentence that names the task where only the model suggests it, or None.
    """

    recipe: RunRecipe
    launch: Launch
    problems: tuple[str, ...]
    guess: str | None = None


def read_asked(
    config: Path | None, flags: Sequence[str], accelerate_config: str | None, world_size: int | None
) -> Asked:
    """Read a recipe file, flags over it, and a launch configuration.

    Args:
        config: the recipe file; None is flags alone.
        flags: words such as `--learning_rate 1e-4`.
        accelerate_config, world_size: see `isotune.preflight.launches.read_launch`.

    Raises:
        UserError: a file that cannot be read as what it is, flags with too few or too many words, an unknown task, or
            no process.
    """
    if world_size is not None and world_size < 1:
        raise UserError(f"--world_size is {world_size}: a launch has at least one process")
    problems: list[str] = []
    recipe, guess = _read_recipe(CommandLine.parse(flags, config), problems)
    launch = read_launch(accelerate_config, world_size, recipe, problems.append)
    return Asked(recipe, launch, tuple(problems), guess)


def _read_recipe(command: CommandLine, problems: list[str]) -> tuple[RunRecipe, str | None]:
    """The recipe, and the sentence of a guess about its task."""
    given = command.given()
    guess = None
    if project := project_of(given):
        if why_not := project.why_not_planned(given):
            raise UserError(why_not)
        kind = project.recipe
    else:
        task = task_of(given)
        if task is None:
            task, guess = _guess_task(command)
            if guess is None:
                problems.append("task is missing: add task: sft or task: classification to the recipe")
        elif task not in TASKS:
            raise UserError(f"task is {task!r}{did_you_mean(task, TASKS)}")
        kind = TASKS[task]
    return kind.from_layers(command.layers(kind.keys()), problems.append), guess


def _guess_task(command: CommandLine) -> tuple[str, str | None]:
    """The task that the model's architecture suggests, and the sentence of the guess; None where no model is found."""
    unchecked = TASKS["sft"].from_layers(command.layers(TASKS["sft"].keys()), lambda sentence: None)
    try:
        architecture = load_config(replace(unchecked, max_seq_length=1)).model_type
    except UserError:
        return "sft", None
    task = "sft" if architecture in PLAIN_HEADS else "classification"
    return task, f"task is guessed to be {task} from the model's type, {architecture}: say task: {task}"
