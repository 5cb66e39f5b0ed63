"""A disk that is full, or gone, at any write ends in one sentence and status 2, and status.json says what happened."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.launching import TINY, start_command, write_recipe

from isotune.cli import main
from isotune.evaluation.results import write_result
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import UserError, run_script
from isotune.report.model_card import write_model_card
from isotune.run.metrics_file import MetricsFile
from isotune.run.preemption import RunStatus
from isotune.run.run_lease import RunLease

LONG = TINY | {"max_steps": 2000, "save_strategy": "no"}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of one's own can be mounted by root only")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no page of the disk free."""
    with (folder / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    with (folder / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1))


def sentence_of(call: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a script that ends with status 2."""
    with pytest.raises(SystemExit) as leaving:
        call()
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and "Traceback" not in err
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return sentence


def status_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_line_of_metrics_that_cannot_be_written_is_one_sentence_with_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = MetricsFile(tmp_path / "metrics.jsonl", RunLease(tmp_path))
    with pytest.raises(UserError, match=r"metrics\.jsonl.*no room on the disk: free some space and run again"):
        metrics.write({"step": 1, "loss": 1.0})
    metrics.close()


@needs_root
def test_status_json_is_true_on_a_full_disk_because_room_was_reserved(disk):
    run = disk / "run"
    lease = RunLease(run)
    lease.acquire()
    (run / "environment.json").write_text("{}")  # the run has begun
    lease.reserve()
    status = RunStatus(run, is_main=True, lease=lease)
    status.reached(3)
    fill(disk)
    with pytest.raises(OSError) as full:
        (disk / "more").write_bytes(b"x" * 10_000)
    assert full.value.errno == errno.ENOSPC
    status.write("failed", 2, "no room")
    assert (status_of(run)["status"], status_of(run)["exit_status"], status_of(run)["step"]) == ("failed", 2, 3)
    lease.release()
    (attempt,) = (run / ".lives").glob("*.over")
    assert "ended" in json.loads((attempt / "life.json").read_text())


@needs_root
def test_report_card_and_evaluation_on_a_full_disk_are_one_sentence_and_leave_what_was_there(disk, capsys):
    run = disk / "run"
    (run / "model").mkdir(parents=True)
    (run / "recipe.yaml").write_text("model_name_or_path: builtin:opt-tiny\ndataset_name: builtin:greetings\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "model" / "README.md").write_text("the card before")
    fill(disk)
    facts = {"kind": "generation", "model": "m", "dataset_name": "d", "dataset_split": "test"}
    rows = [{"id": n, "text": "x" * 5000} for n in range(10)]
    writes: dict[str, Callable[[], Any]] = {
        "report.html": lambda: main(["report", str(run)]),
        "README.md": lambda: run_script(lambda: print(write_model_card(run))),
        "eval": lambda: run_script(
            lambda: write_result(run / "eval" / "test", facts, Scores({}, {}), rows, ["text"] * 10)
        ),
    }
    for name, call in writes.items():
        sentence = sentence_of(call, capsys)
        assert name in sentence and ("no room" in sentence or "No space left" in sentence), sentence
    assert (run / "model" / "README.md").read_text() == "the card before"
    assert not list(run.rglob("*.tmp")) and not (run / "eval" / "test" / "metrics.json").exists()


def begun(folder: Path, recipe: dict[str, Any]) -> Any:
    """A process that trains and has written two lines."""
    process = start_command([sys.executable, "train/sft_opt.py", "--config", str(write_recipe(folder, recipe))])
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@needs_root
def test_a_run_whose_disk_is_full_in_its_middle_ends_with_one_sentence_and_a_true_status(disk):
    process = begun(disk, LONG)
    fill(disk)
    _, err = process.communicate(timeout=120)
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in err
    assert "metrics.jsonl" in sentence and "no room on the disk" in sentence
    status = status_of(disk / "run")
    assert (status["status"], status["exit_status"]) == ("failed", 2) and "no room" in status["message"]


def test_a_run_whose_folder_is_removed_in_its_middle_ends_with_one_sentence(tmp_path):
    process = begun(tmp_path, LONG)
    while (tmp_path / "run").exists():  # it may be writing a file at this moment
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    _, err = process.communicate(timeout=120)
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in err
    assert "is gone: it was removed, or its disk went away" in sentence and str(tmp_path / "run") in sentence
    assert not (tmp_path / "run").exists()
