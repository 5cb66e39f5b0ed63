"""Of several lives that take a run folder for theirs only the newest writes, and a folder in use is refused."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isotune.checkpoint.store import CheckpointStore
from isotune.io import files
from isotune.io.errors import Superseded, UserError
from isotune.run import run_lease as fences
from isotune.run.metrics_file import MetricsFile
from isotune.run.preemption import RunStatus
from isotune.run.run_lease import RunLease

HOLDER = """
import sys
from pathlib import Path
from isotune.run.run_lease import RunLease
RunLease(Path(sys.argv[1])).acquire()
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(fences, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(fences, "WATCH_SECONDS", 1.0)


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def holder(run) -> Iterator[subprocess.Popen]:
    """Another process that holds `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def life_of(monkeypatch, job: str | None, restart: int = 0) -> None:
    """From here on this process belongs to that life of that job."""
    for name, value in {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart) if restart else None}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def taken(run: Path) -> RunLease:
    one = RunLease(run, end=lambda sentence: None)
    one.acquire()
    return one


def change(run: Path, **values: Any) -> None:
    """Write something else about whoever holds the run."""
    (record,) = [file for file in run.glob(".lives/*/life.json") if not file.parent.name.endswith(".over")]
    record.write_text(json.dumps(json.loads(record.read_text()) | values))


def test_a_run_in_use_is_refused_by_the_host_and_the_process_that_hold_it(run, holder):
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on {os.uname().nodename}"):
        RunLease(run).acquire()
    assert len(list((run / ".lives").iterdir())) == 1


def test_a_holder_that_was_killed_is_taken_over_at_once(run, holder):
    holder.kill()
    holder.wait()
    before = time.monotonic()
    taken(run)
    assert time.monotonic() - before < 1


def test_a_holder_that_is_dead_but_not_buried_is_taken_over(run, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    taken(run)


def test_another_process_with_the_number_of_a_dead_holder_does_not_pass_for_it(run, holder):
    change(run, started="1")
    taken(run)


def test_a_holder_on_another_machine_is_refused_while_its_heart_beats_and_taken_over_when_it_does_not(run, capsys):
    beating = taken(run)
    change(run, host="far", machine="far away", pid=7)
    with pytest.raises(UserError, match="in use by process 7 on far"):
        RunLease(run).acquire()
    beating._released.set()
    time.sleep(0.2)
    taken(run)
    assert "was held by process 7 on far: watching its heartbeat for 1 s" in capsys.readouterr().out


def test_the_next_life_of_a_job_takes_over_and_an_earlier_one_that_comes_late_ends(run, monkeypatch):
    life_of(monkeypatch, "12", 1)
    first = taken(run)
    life_of(monkeypatch, "12", 2)
    second = taken(run)
    with pytest.raises(Superseded, match=r"taken over by process \d+ on .* \(SLURM job 12, restart 2\)"):
        first.check()
    second.check()
    life_of(monkeypatch, "12", 1)
    with pytest.raises(Superseded, match=r"held by a later attempt of this job: .*restart 2"):
        RunLease(run).acquire()
    life_of(monkeypatch, "13")
    with pytest.raises(UserError, match=r"in use by .*SLURM job 12, restart 2"):
        RunLease(run).acquire()


def two_lives(run: Path, monkeypatch) -> tuple[RunLease, RunLease]:
    life_of(monkeypatch, "5")
    first = taken(run)
    (run / "checkpoints").mkdir()
    life_of(monkeypatch, "5", 1)
    return first, RunLease(run)


def test_a_checkpoint_that_was_whole_but_for_its_name_is_not_published_by_a_life_that_is_over(run, monkeypatch):
    first, second = two_lives(run, monkeypatch)
    store = CheckpointStore(run / "checkpoints", lease=first)
    staging = store.stage(3)
    (staging / "file").write_text("whole")
    monkeypatch.setattr(store, "check_lease", lambda: second.acquire())  # in the very moment after the last look
    with pytest.raises(FileNotFoundError):
        store.publish(staging, 3)
    assert list((run / "checkpoints").iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(Superseded):
        store.stage(4)


def test_a_life_that_is_over_neither_replaces_nor_removes_a_checkpoint(run, monkeypatch):
    first, second = two_lives(run, monkeypatch)
    store = CheckpointStore(run / "checkpoints", limit=1, lease=first)
    old = run / "checkpoints" / "step-00000003"
    old.mkdir()
    staging = store.stage(3)
    monkeypatch.setattr(store, "check_lease", lambda: second.acquire() if second.folder is None else None)
    with pytest.raises(FileNotFoundError):
        store.publish(staging, 3)
    store.prune(newest=4, best=None)
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def test_a_life_that_is_over_appends_nothing_to_the_metrics_even_through_a_file_it_has_open(run, monkeypatch):
    first, second = two_lives(run, monkeypatch)
    metrics = run / "metrics.jsonl"
    file = MetricsFile(metrics, first)
    file.write({"step": 1})
    second.acquire()
    second.write_file(metrics, metrics.read_text())  # as RunDir.hold does
    with pytest.raises(Superseded):
        file.write({"step": 2})
    with monkeypatch.context() as moment:
        moment.setattr(first, "check", lambda: None)  # it has looked just before
        file.write({"step": 2})
    assert metrics.read_text() == '{"step": 1}\n'
    with pytest.raises(Superseded):
        MetricsFile(metrics, first)


def test_a_life_that_is_over_replaces_no_file(run, monkeypatch):
    first, second = two_lives(run, monkeypatch)
    first.write_file(run / "status.json", "first")
    second.acquire()
    second.write_file(run / "status.json", "second")
    with pytest.raises(Superseded):
        first.write_file(run / "status.json", "first")
    assert (run / "status.json").read_text() == "second"


def test_a_life_sees_by_itself_that_it_is_over(run, monkeypatch):
    ended = threading.Event()
    life_of(monkeypatch, "5")
    said: list[str] = []
    first = RunLease(run, end=lambda sentence: (said.append(sentence), ended.set()))
    first.acquire()
    life_of(monkeypatch, "5", 1)
    taken(run)
    assert ended.wait(5)
    assert "restart 1): a stale attempt can no longer write" in said[0]


def test_of_many_that_come_at_the_same_moment_one_is_left(run, monkeypatch):
    monkeypatch.setattr(RunLease, "check_available", lambda lease: None)
    all_of_them = [RunLease(run, end=lambda sentence: None) for _ in range(16)]
    start = threading.Barrier(len(all_of_them))

    def take(one: RunLease) -> None:
        start.wait()
        try:
            one.acquire()
        except Superseded:
            one.folder = run / "nowhere"

    threads = [threading.Thread(target=take, args=(one,)) for one in all_of_them]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.folder is not None and one.folder.is_dir() for one in all_of_them) == 1


def test_a_run_that_was_let_go_is_free_and_one_that_never_began_leaves_nothing(run):
    one = taken(run)
    (run / "environment.json").write_text("{}")
    one.release()
    two = taken(run)
    assert two.folder is not None and two.folder.name.startswith("00000002-")
    (run / "environment.json").unlink()
    two.release()
    assert not run.exists()


@pytest.mark.parametrize("ends", ["lets go", "is killed", "is taken over"])
def test_the_next_life_removes_the_checkpoint_that_one_left_half_written(run, monkeypatch, ends):
    life_of(monkeypatch, "5")
    first = taken(run)
    (run / "environment.json").write_text("{}")
    staging = CheckpointStore(run / "checkpoints", lease=first).stage(5)
    (staging / "shard.safetensors").write_bytes(b"0" * 1000)
    if ends == "lets go":
        first.release()
    elif ends == "is killed":
        change(run, pid=2**30)
        first._released.set()
    life_of(monkeypatch, "5", 1)
    second = taken(run)
    assert list(run.rglob("*.safetensors")) == []
    assert [folder.name[:8] for folder in sorted((run / ".lives").iterdir())] == ["00000001", "00000002"]
    second.check()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ESTALE])
def test_a_disk_that_went_away_is_one_sentence(run, monkeypatch, number):
    holder = taken(run)
    stock = os.stat

    def stat(path, *given, **more):
        if str(path).startswith(str(run)):
            raise OSError(number, os.strerror(number), str(path))
        return stock(path, *given, **more)

    def open_nothing(path, text):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(files, "write_synced", open_nothing)
    for use in (holder.check, lambda: holder.write_file(run / "status.json", "{}")):
        with pytest.raises(UserError, match="is gone: it was removed, or its disk went away"):
            use()
    RunStatus(run, is_main=True, lease=holder).write("failed", 2, "what ended it is not hidden")
