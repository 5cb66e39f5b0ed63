"""A wheel in an empty folder: everything that a checkout has is there, offline, and sentences name what this user has.

The environment is a fresh one whose libraries are links to those of the tests, without the packages of the extras.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from tests.launching import REPOSITORY

from isotune.io.extras import EXTRAS

SOURCES = ("src", "train", "eval", "accelerate_configs", "ds_configs", "slurm")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "CHANGELOG.md")
# of the extras, and what comes with an editable install of the checkout
LEFT_OUT = {*EXTRAS, "isotune", "__editable__"}
SHIPPED = ("train/configs", "eval/configs", "eval/metrics", "accelerate_configs", "ds_configs", "slurm")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and an empty folder to work in."""

    binaries: Path
    packages: Path
    folder: Path

    def run(self, *words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `isotune WORDS` in the folder, offline; asserts the exit status `expect`."""
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ISOTUNE_CACHE": str(self.folder.parent / "cache")}
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command = [str(self.binaries / "isotune"), *words]
        done = subprocess.run(
            command, cwd=self.folder, env={**kept, **offline}, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == expect, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline from a copy of the checkout."""
    checkout, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=ignored)
    for name in FILES:
        shutil.copy2(REPOSITORY / name, checkout / name)
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(target), str(checkout)]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = target.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    """A fresh environment without extras in which the wheel is installed."""
    root = tmp_path_factory.mktemp("installed")
    environment, folder = root / "environment", root / "empty"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    scheme = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=scheme))
    left_out = LEFT_OUT | {
        Path(file.parts[0]).name
        for package in EXTRAS
        for name in metadata.packages_distributions().get(package, ())
        for file in metadata.files(name) or ()
        if file.parts[0] != ".."
    }
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name not in left_out and not entry.name.startswith(("__editable__", "isotune-")):
            (packages / entry.name).symlink_to(entry)
    python = str(environment / "bin/python")
    offline = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command = [sys.executable, "-m", "pip", "--python", python, "install", *offline, str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return Installed(environment / "bin", packages, folder)


def test_the_wheel_carries_the_files_of_the_checkout_byte_for_byte(wheel):
    with zipfile.ZipFile(wheel) as archive:
        there = {name: archive.read(name) for name in archive.namelist() if name.startswith("isotune/_files/")}
        code = {name for name in archive.namelist() if name.endswith(".py") and "/_files/" not in name}
    files = [file for folder in SHIPPED for file in (REPOSITORY / folder).rglob("*") if file.is_file()]
    files = [file for file in files if "__pycache__" not in file.parts] + [REPOSITORY / "constraints.txt"]
    assert there == {f"isotune/_files/{file.relative_to(REPOSITORY)}": file.read_bytes() for file in files}
    assert code == {str(file.relative_to(REPOSITORY / "src")) for file in (REPOSITORY / "src/isotune").rglob("*.py")}


def test_it_lists_copies_and_writes_batch_files(installed):
    assert "opinions_tiny" in installed.run("ls", "recipes").stdout
    assert installed.run("ls", "runs").stdout == "Runs in runs:\n  none\n"
    installed.run("cp", "yelp_bert", "mine.yaml")
    flags = ("--nodes", "2", "--gpus_per_node", "4", "--dry-run")
    lines = installed.run("slurm", "classify", "mine.yaml", *flags).stdout.splitlines()
    carried = installed.packages / "isotune/_files"
    assert f"export ISOTUNE_FILES={carried} ENGINE=${{ENGINE:-ddp}}" in lines
    assert any(line.endswith(f"export ISOTUNE_VENV={installed.binaries.parent}") for line in lines)
    assert lines[-1] == "launch -m isotune.cli classify --config mine.yaml"
    assert (carried / "slurm/launch.sh").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sft", "demo_base", "--engine", "zero2"), "--engine zero2 needs deepspeed: pip install 'isotune[deepspeed]'"),
        (("sft", "demo_base", "--deepspeed", "x"), "choose the engine by --engine NAME (`isotune ls engines`)"),
        (("sft", "demo_bse"), "did you mean demo_base?"),
        (("arena", "arena_baselines", "--dataset_name", "x"), "needs simplemma: pip install 'isotune[arena]'"),
        (("compare", ".", "."), "run isotune eval ."),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_sentence_that_names_what_this_user_has(installed, words, says):
    done = installed.run(*words, expect=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.slow  # in short: what this user has is listed, copied and named above
def test_a_classifier_is_trained_without_any_extra(installed):
    done = installed.run("classify", "opinions_tiny", "--max_steps", "2", "--eval_strategy", "no")
    assert done.stdout.startswith("loading ")
    status = json.loads((installed.folder / "runs/opinions_tiny/status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", 2)


@pytest.mark.slow
def test_the_whole_way_in_an_empty_folder(installed):
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "yes"}]
    chats = [{"messages": [{**turns[0], "content": f"{i}?"}, turns[1]]} for i in range(8)]
    (installed.folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tiny = ("--model_name_or_path", "builtin:opt-tiny", "--tune", "full", "--max_seq_length", "64")
    flags = (*tiny, "--max_steps", "2", "--global_batch_size", "2", "--num_processes", "2", "--engine", "fsdp2")
    trained = installed.run("sft", "chats.jsonl", *flags, "--eval_dataset_name", "chats.jsonl", "--sample_prompt", "1?")
    assert "chosen      --output_dir runs/chats" in trained.stdout and "launching   fsdp2 on 2" in trained.stdout
    assert installed.run("chat", "runs/chats", "--prompt", "1?", "--max_new_tokens", "2").stdout
    refused = installed.run("eval", "runs/chats", expect=2)
    assert "an evaluation of answers needs sacrebleu: pip install 'isotune[eval]'" in refused.stderr
    installed.run("cp", "opinions_tiny", "tiny.yaml")
    installed.run("classify", "tiny.yaml", "--max_steps", "2", "--output_dir", "runs/tiny", "--num_processes", "2")
    installed.run("eval", "runs/tiny", "--task", "opinions", "--resamples", "20", "--no_pictures")
    (result,) = (installed.folder / "runs/tiny/eval").glob("*/metrics.json")
    assert json.loads(result.read_text())["rows"] == 120
    assert "runs/chats" in installed.run("ls", "runs").stdout
    installed.run("plan", "--config", "opinions_tiny", "--accelerate_config", "ddp", "--world_size", "2")
    installed.run("export", "runs/tiny")
    installed.run("report", "runs/tiny")
    (installed.folder / "reviews.csv").write_text("text,stars\ngood,5\nbad,1\n")
    few = ("--model_name_or_path", "builtin:bert-tiny", "--num_processes", "2", "--dataset_text_field", "txt")
    done = installed.run("classify", "reviews.csv", *few, "--eval_strategy", "no", expect=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    table = json.loads(installed.run("doctor", "--json").stdout)
    assert {finding["subject"]: finding["status"] for finding in table["findings"]}["versions"] == "ok"
