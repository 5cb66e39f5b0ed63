"""The `isotune` command says what it can do, and says a mistake in one sentence."""

import importlib.metadata
import re
import subprocess
import sys

import pytest

from isotune.cli import main


def run(capsys, *arguments):
    """Exit status, stdout and stderr of `isotune ARGUMENTS`."""
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    printed = capsys.readouterr()
    return leaving.value.code or 0, printed.out, printed.err


def test_the_version_is_that_of_the_package(capsys):
    assert run(capsys, "--version") == (0, f"isotune {importlib.metadata.version('isotune')}\n", "")


def test_help_names_every_command_with_what_it_is_for(capsys):
    status, help_text, _ = run(capsys, "--help")
    assert status == 0
    listed = help_text.split("COMMAND\n")[1].split("\n\n")[0]
    commands = re.findall(r"^    (\S+)(.*(?:\n {5,}.*)*)", listed, re.MULTILINE)
    assert {name: " ".join(use.split()) for name, use in commands} == {
        "sft": "train a language model: isotune sft RECIPE | RUN | DATA [FLAGS]",
        "classify": "train a classifier: isotune classify RECIPE | RUN | DATA [FLAGS]",
        "arena": "train on the Chatbot Arena: isotune arena RECIPE [FLAGS]",
        "eval": "evaluate: isotune eval RUN | MODEL [FLAGS]",
        "chat": "talk with a model: isotune chat RUN | MODEL [FLAGS]",
        "predict": "predict texts, or rows: isotune predict RUN | MODEL TEXT ... | --input DATA --output FILE",
        "serve": "a page and an API of a run on this machine: isotune serve RUN [FLAGS]",
        "sweep": "search keys of a recipe: isotune sweep RECIPE --KEY LOW..HIGH | A,B,C ... [FLAGS]",
        "slurm": "submit to a cluster: isotune slurm sft|classify|arena|eval WHAT [FLAGS]",
        "ls": "list shipped recipes, tasks and engines, models, and the runs here",
        "cp": "copy a shipped recipe, task or engine to a file of your own",
        "runs": "list runs with their state, progress, best metric and age",
        "export": "write a run's model for use elsewhere, an adapter merged into its base",
        "compare": "test whether runs differ on the same evaluated rows",
        "ensemble": "blend the predictions of classifiers and baselines on the same rows",
        "report": "write one self-contained HTML file of a run, or of several side by side",
        "validate-submission": "check a submission.csv and list all its mistakes",
        "plan": "show what a run will do and need of memory, time and money, before it starts",
        "doctor": "check this machine and launch for what could spoil a run",
    }


def test_the_help_of_export_shows_the_formats_and_an_example(capsys):
    status, help_text, _ = run(capsys, "export", "--help")
    assert status == 0
    for part in ("--merge", "--format", "safetensors", "pt", "--output", "isotune export runs/"):
        assert part in help_text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["exprt", "run"], "'exprt'"),
        (["export"], "RUN"),
        (["export", "run", "--format"], "--format: expected one argument (see isotune export --help)"),
        (["export", "run", "--formt", "pt"], "--formt"),
        (["export", "/nowhere/run"], "/nowhere/run"),
        (["export", "/nowhere/run", "--format", "gptq"], "--format gptq is unknown: it may be safetensors or pt"),
        ([], "a command is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(capsys, arguments, says):
    status, _, complaint = run(capsys, *arguments)
    assert status == 2
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert says in complaint


def test_the_command_runs_as_a_module_and_as_a_console_script():
    as_module = subprocess.run(
        [sys.executable, "-m", "isotune.cli", "--version"], capture_output=True, text=True, check=True
    )
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="isotune")
    assert script.load() is main
    assert as_module.stdout.startswith("isotune ")


def test_help_is_answered_without_loading_what_takes_time():
    heavy = "{'torch', 'transformers', 'pydantic', 'yaml', 'numpy'}"
    code = (
        f"import sys, isotune.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print({heavy} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "set()"
