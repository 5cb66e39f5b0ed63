"""A lock is waited for while its holder lives, and a holder that shows no sign of life is named."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from isotune.io import locks
from isotune.io.errors import UserError
from isotune.io.locks import held

HOLDER = """
import sys, time
from pathlib import Path
from isotune.io import locks
locks.BEAT_SECONDS = 0.05
with locks.held(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(locks, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(locks, "NOTE_SECONDS", 0.3)


def test_a_holder_that_works_longer_than_the_limit_is_waited_for(tmp_path, capsys):
    lock, has_begun, order = tmp_path / "a.lock", threading.Event(), []

    def work() -> None:
        with held(lock):
            has_begun.set()
            time.sleep(2.5)
            order.append("first")

    worker = threading.Thread(target=work)
    worker.start()
    has_begun.wait()
    with held(lock):
        order.append("second")
    worker.join()
    assert order == ["first", "second"] and not list(tmp_path.glob("*.holder"))
    assert f"waiting for {lock}, which process {os.getpid()} on " in capsys.readouterr().out


def test_a_stopped_process_that_holds_it_is_named_and_a_dead_one_holds_nothing(tmp_path: Path):
    lock = tmp_path / "a.lock"
    environment = os.environ | {"RANK": "3"}
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
            holder.send_signal(signal.SIGSTOP)
            with (
                pytest.raises(UserError, match=rf"held by rank 3, process {holder.pid} on .*no sign of life"),
                held(lock),
            ):
                pass
        finally:
            holder.kill()
    with held(lock):
        assert (tmp_path / "a.lock.holder").read_text().startswith("process ") or "RANK" in os.environ
