"""`isotune eval` and `isotune chat`: a run or a model is evaluated as what it is, a classifier or a language model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotune.commands import start
from isotune.commands.before_torch import before_torch
from isotune.config.layers import read_file
from isotune.config.recipes import task_of
from isotune.io.errors import UserError
from isotune.io.run_files import RECIPE

EVAL = """isotune eval RUN | MODEL [--num_processes N] [--engine NAME] [FLAGS]

A run is evaluated on its own evaluation data unless the flags name others; a model needs --task or --dataset_name."""
CHAT = """isotune chat RUN | MODEL [--prompt TEXT] [--temperature T] [--top_p P] [--max_new_tokens N]

A conversation, or with --prompt the answer to one question."""


def run_eval(argv: Sequence[str]) -> int | None:
    """`isotune eval ARGV`, here or on the processes of a launch."""
    launch, rest = start.read_launch(argv)
    source, flags = read_source("eval", rest, EVAL)
    classifies = is_classifier(source)
    if not classifies:
        flags += _own_data(source, flags)
    given = _arguments(classifies, [*source, *flags], "isotune eval", EVAL)
    if launch.file is not None:
        return start.run_launched(["eval", source[1], *flags], launch)
    if classifies:
        from isotune.commands.trained.evaluate_classifier import evaluate_classifier

        evaluate_classifier(given)
    else:
        from isotune.commands.trained.generate import generate

        generate(given)
    return None


def run_chat(argv: Sequence[str]) -> None:
    """`isotune chat ARGV`, in this process."""
    source, flags = read_source("chat", argv, CHAT)
    if source[0] == "--run_dir" and is_classifier(source):
        raise UserError(f"{source[1]} is the run of a classifier, which answers nothing: isotune eval evaluates it")
    asks = any(flag.partition("=")[0] in ("--prompt", "--interactive") for flag in flags)
    from isotune.commands.trained.generate import generate

    generate(_arguments(False, [*source, *flags, *([] if asks else ["--interactive"])], "isotune chat", CHAT))


def _arguments(classifies: bool, words: Sequence[str], prog: str, description: str) -> argparse.Namespace:
    if classifies:
        from isotune.commands.trained.evaluate_classifier import read_arguments
    else:
        from isotune.commands.trained.generate import read_arguments
    return read_arguments(words, prog=prog, description=description)


def read_source(command: str, argv: Sequence[str], usage: str) -> tuple[list[str], list[str]]:
    """The run or model as the scripts' flag for it, and the flags after it."""
    words = list(argv)
    if {"-h", "--help"} & set(words) and (not words or words[0].startswith("-")):
        print(usage, "\nThe flags are those of a classifier or of a language model: isotune eval RUN --help", sep="\n")
        sys.exit(0)
    if not words or words[0].startswith("-"):
        raise UserError(f"isotune {command}: name a run or a model first (`isotune ls` lists the runs)")
    what = words.pop(0)
    if other := next((word for word in words if word.partition("=")[0] in ("--run_dir", "--model")), None):
        raise UserError(f"{other}: the run or model is named already, {what}")
    if (Path(what) / RECIPE).is_file():
        return ["--run_dir", what], words
    if Path(what).name == "model" and (Path(what).parent / RECIPE).is_file():  # with all that its run says of it
        return ["--run_dir", str(Path(what).parent)], words
    if not Path(what).exists() and what.startswith((".", "/", "~", "runs/")):
        raise UserError(f"{what}: there is no such run or model (`isotune ls` lists the runs)")
    return ["--model", what], words


def is_classifier(source: Sequence[str]) -> bool:
    """Whether the run or model of `read_source` is a classifier, and no language model."""
    flag, name = source
    if flag == "--run_dir":
        return task_of(read_file(Path(name, RECIPE)).given) == "classification"
    before_torch(quiet=True)
    from isotune.models.opening import load_pretrained_config

    architectures: Any = load_pretrained_config(name).architectures
    return any("SequenceClassification" in str(one) for one in architectures or ())


def _own_data(source: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The evaluation data of a run, as flags, where the command line names nothing to evaluate on."""
    named = {flag.partition("=")[0] for flag in flags}
    if {"--dataset_name", "--task", "--lm_eval_tasks", "--prompt", "--interactive", "-h", "--help"} & named:
        return []
    if source[0] == "--model":
        raise UserError(f"{source[1]}: say what to evaluate it on, by --dataset_name or --task (isotune chat asks it)")
    recipe = read_file(Path(source[1], RECIPE)).given
    if recipe.get("eval_dataset_mixture"):
        raise UserError(f"{source[1]} was evaluated on several data sets: say one of them by --dataset_name")
    if not (data := recipe.get("eval_dataset_name")):
        raise UserError(f"{source[1]} was trained without evaluation data: say --dataset_name or --task")
    split = None if "--dataset_split" in named else recipe.get("eval_dataset_split")
    return ["--dataset_name", str(data), *(["--dataset_split", str(split)] if split else [])]
