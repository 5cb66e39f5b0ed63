"""Two processes on one run folder: the second is refused, or, as the next life of a job, ends what the first can do."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.distributed.test_preemption import LONG, begin
from tests.launching import TINY, start

SHORT = LONG | {"save_steps": 4, "max_steps": 16}
HOLDER = """
import sys
from pathlib import Path
from isotune.run.run_lease import RunLease
RunLease(Path(sys.argv[1])).acquire()
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_second_run_on_a_folder_in_use_is_refused_by_the_name_of_the_process_that_holds_it(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
    try:
        refused = start(tmp_path, TINY, expect=2)
    finally:
        holder.kill()
        holder.communicate()
    assert f"is in use by process {holder.pid} on {os.uname().nodename}: wait for it, stop it" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert sorted(path.name for path in refused.run.iterdir()) == [".lives"]


def contents(run: Path) -> dict[str, str]:
    """The hash of every file that a reader of the run would look at."""
    shown = (path for path in run.rglob("*") if path.is_file() and ".lives" not in path.parts)
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in shown}


def test_a_life_that_wakes_up_after_the_next_one_has_begun_writes_nothing_and_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    asleep = begin(tmp_path, SHORT, processes=0)
    asleep.wait_for_step(3)
    asleep.process.send_signal(signal.SIGSTOP)
    try:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        next_life = start(tmp_path, SHORT)
        assert [line["step"] for line in next_life.steps] == list(range(1, SHORT["max_steps"] + 1))
        assert next_life.environment["slurm"] == {"job_id": "77", "restart": 1}
        before = contents(asleep.run)
    finally:
        asleep.process.send_signal(signal.SIGCONT)
    returned, errors = asleep.end()
    assert returned == 1
    assert "a stale attempt can no longer write" in errors
    assert contents(asleep.run) == before
