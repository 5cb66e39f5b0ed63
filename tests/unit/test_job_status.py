"""The job status file tells a batch script how a script ended; rank 0 reports, or another rank where it is gone."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.launching import REPOSITORY

from isotune.io.errors import (
    MEMORY,
    AlreadyDone,
    Preempted,
    RunFault,
    Superseded,
    UserError,
    run_script,
    write_job_status,
)

LAUNCH = REPOSITORY / "slurm" / "launch.sh"
STARTING = """
import time
from isotune.io.errors import run_script
def main():
    print("starting", flush=True)
    time.sleep(60)
run_script(main)
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ISOTUNE_VERDICT", str(tmp_path / "verdict.json"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "verdict.json"


@pytest.fixture(autouse=True)
def handlers():
    """`run_script` hears signals; a test leaves them as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def told(file: Path) -> tuple[str, int]:
    said = json.loads(file.read_text())
    return said["status"], said["exit_status"]


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (None, ("finished", 0)),
        (AlreadyDone("there"), ("finished", 0)),
        (UserError("row 3"), ("failed", 2)),
        (RunFault("leaks"), ("failed", 1)),
        (Superseded("by another"), ("superseded", 1)),
        (Preempted("after step 3"), ("preempted", 75)),
        (KeyError("a bug"), ("failed", 1)),
    ],
)
def test_every_end_has_its_word_and_number(file, error, verdict):
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises((SystemExit, KeyError)):
        run_script(main)
    assert told(file) == verdict


def test_the_reason_of_a_mistake_that_other_values_do_not_make_is_written(file):
    def main() -> None:
        raise UserError("too large", reason=MEMORY)

    with pytest.raises(SystemExit):
        run_script(main)
    assert json.loads(file.read_text())["reason"] == MEMORY


@pytest.mark.parametrize(("launched", "status"), [(False, 75), (True, 0)])
def test_ranks_of_a_launcher_leave_a_preemption_to_the_verdict(file, monkeypatch, launched, status):
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")

    def main() -> None:
        raise Preempted("after step 3")

    with pytest.raises(SystemExit) as leaving:
        run_script(main)
    assert leaving.value.code == status and told(file) == ("preempted", 75)


def test_the_first_process_speaks_and_another_one_only_where_it_is_silent(file, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    write_job_status(status="finished", exit_status=0)
    assert not file.exists()
    write_job_status(status="failed", exit_status=1)
    assert told(file) == ("failed", 1)
    monkeypatch.setenv("RANK", "0")
    write_job_status(status="preempted", exit_status=75)
    monkeypatch.setenv("RANK", "3")
    write_job_status(status="failed", exit_status=1)
    assert told(file) == ("preempted", 75)


def test_a_mistake_in_the_input_stays_one_whatever_breaks_because_of_it(file, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    write_job_status(status="failed", exit_status=2, message="no such file on this node")
    monkeypatch.setenv("RANK", "0")
    write_job_status(status="failed", exit_status=1, message="connection closed by peer")
    assert told(file) == ("failed", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_is_a_preemption_even_where_the_launcher_ignores_it(file, number):
    ignoring = f"import signal, subprocess, sys; signal.signal({int(number)}, signal.SIG_IGN)\n"
    script = ignoring + f"sys.exit(subprocess.call([sys.executable, '-c', {STARTING!r}]))"
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == b"starting\n"
    os.killpg(launcher.pid, number)
    assert launcher.wait(20) == 75
    assert told(file) == ("preempted", 75)


def test_without_the_variable_nothing_is_written_and_signals_are_left_alone(file, monkeypatch, tmp_path):
    monkeypatch.delenv("ISOTUNE_VERDICT")
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit):
        run_script(lambda: None)
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("name", ["müller", "世界 1", "a\\b"])
def test_the_batch_script_reads_a_path_of_any_letters(file, name):
    write_job_status(status="finished", exit_status=0, message=None, run=f"/runs/{name}")
    assert json.loads(file.read_text("utf-8"))["run"] == f"/runs/{name}"
    if "\\" not in name:  # which JSON writes twice
        assert read_by_bash(file) == f"finished:0 /runs/{name}"


def test_a_path_that_is_not_utf_8_is_written_as_an_escape(file):
    run = os.fsdecode(b"/runs/caf\xe9-\xc3\xa9")
    write_job_status(status="finished", exit_status=0, message=None, run=run)
    assert json.loads(file.read_text("utf-8"))["run"] == run and read_by_bash(file).startswith("finished:0 ")


def read_by_bash(file: Path) -> str:
    """What slurm/launch.sh reads."""
    reader = re.search(r"^read_job_status\(\) \{.*?^\}", LAUNCH.read_text(), re.MULTILINE | re.DOTALL)
    assert reader is not None
    script = f'{reader[0]}\nISOTUNE_VERDICT=$1; read_job_status; printf "%s" "$status:$exit_status $run"'
    return subprocess.run(["bash", "-c", script, "-", file], capture_output=True, check=True).stdout.decode()


@pytest.mark.parametrize(("restarts", "limit", "status"), [(0, 100, 0), (3, 3, 75)])
def test_a_stop_as_the_first_launch_ends_does_not_begin_the_second(tmp_path, restarts, limit, status):
    tools = {
        "scontrol": 'case $1 in show) echo node1;; -o) echo "JobState=RUNNING x Restarts=$SLURM_RESTART_COUNT ";;\n'
        "requeue) echo requeued $2;; esac\n",
        # the ranks have finished already when the signal comes
        "srun": 'echo "began"; printf \'{\\n "status": "finished",\\n "exit_status": 0\\n}\\n\' >"$ISOTUNE_VERDICT"\n'
        "trap '' USR1; kill -USR1 $PPID; sleep 0.5\n",
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    job = '. "$ISOTUNE_FILES/slurm/launch.sh" || exit 2\nlaunch one.py\necho between\nlaunch two.py\necho after\n'
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "ISOTUNE_HOME": str(tmp_path), "MAX_RESTARTS": str(limit),
        "ISOTUNE_FILES": str(LAUNCH.parent.parent), "ISOTUNE_VENV": sys.prefix, "SLURM_JOB_NAME": "a",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1",
        "SLURM_RESTART_COUNT": str(restarts), "ENGINE": "single",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", job], env={**os.environ, **variables}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.count("began") == 1 and "between" in done.stdout and "after" not in done.stdout
    assert ("requeued 7" in done.stdout) is (status == 0)
