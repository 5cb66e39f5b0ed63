"""Signals set a flag, a second interrupt ends the process, and status.json says how a run ended."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.launching import start_command
from torch.distributed import DistNetworkError

from isotune.distributed.launch import Process
from isotune.io.errors import Preempted, RunFault, UserError
from isotune.run.preemption import SAME_KEYSTROKE_SECONDS, RunStatus, StopRequest, stop_request, supervised
from isotune.run.run_lease import RunLease

LISTENER = """
import signal, sys, time
from isotune.run.preemption import SIGNALS, stop_request
for number in SIGNALS:
    signal.signal(number, stop_request.on_signal)
said = open(sys.argv[1], "w", buffering=1)
print("ready", file=said)
while True:
    time.sleep(0.01)
    if stop_request.by:
        heard, stop_request.by = stop_request.by, None
        print(heard, file=said)
"""


class Run:
    """What `supervised` needs of a run folder."""

    def __init__(self, path):
        self.path, self.again = path, "the same command"
        self.status: Any = None
        self.is_trained = False
        self.lease = RunLease(path)

    def acquire_lease(self, processes: int) -> Path:
        """As a run folder is held."""
        return self.lease.acquire()


def process(rank: int = 0) -> Process:
    import torch

    return Process(rank, 1, torch.device("cpu"))


def test_an_interrupt_and_its_echo_are_one_and_a_second_one_ends_the_process(tmp_path):
    file, expected = tmp_path / "said", []
    listener = start_command([sys.executable, "-c", LISTENER, str(file)])

    def expect(line: str) -> None:
        expected.append(line)
        ends = time.monotonic() + 60
        while (said := file.read_text().split() if file.exists() else []) != expected:
            assert listener.poll() is None and time.monotonic() < ends, (said, expected)
            time.sleep(0.01)

    expect("ready")
    for _ in range(2):  # the terminal's, and the launcher's echo
        listener.send_signal(signal.SIGINT)
        expect("SIGINT")
    listener.send_signal(signal.SIGTERM)
    expect("SIGTERM")
    time.sleep(SAME_KEYSTROKE_SECONDS + 0.1)
    listener.send_signal(signal.SIGINT)
    assert listener.wait(10) == -signal.SIGINT


def test_the_first_signal_is_the_one_that_is_remembered():
    request = StopRequest()
    request.on_signal(signal.SIGUSR1)
    request.on_signal(signal.SIGTERM)
    assert request.by == "SIGUSR1"


@pytest.mark.parametrize(
    ("error", "status", "number"),
    [
        (None, "finished", 0),
        (Preempted("stopped after step 3"), "preempted", 75),
        (UserError("no room"), "failed", 2),
        (RunFault("not finite"), "failed", 1),
        (MemoryError("gone"), "failed", 1),
    ],
)
def test_status_json_says_how_a_run_ended(tmp_path, error, status, number):
    run = Run(tmp_path)
    (tmp_path / "environment.json").write_text("{}")  # the run has begun

    def body() -> None:
        with supervised(run, process()):
            run.status.reached(3)
            assert json.loads((tmp_path / "status.json").read_text())["status"] == "running"
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    run.status.reached(4)  # by a thread that came too late
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["status"], found["exit_status"], found["step"]) == (status, number, 3)
    assert found["message"] == (str(error) if error else None)
    assert signal.getsignal(signal.SIGUSR1) is not None and "on_signal" not in repr(signal.getsignal(signal.SIGUSR1))


def test_a_rank_that_its_launcher_left_was_preempted_and_one_that_lost_the_store_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_request, "by", None)
    (tmp_path / "environment.json").write_text("{}")
    run = Run(tmp_path)
    run.again = "--resume auto"  # as of a recipe with another `resume`
    for signals, ends, word in ((False, DistNetworkError, "failed"), (True, Preempted, "preempted")):
        said = "was killed; --resume auto goes on$" if signals else "got 0 bytes"
        with pytest.raises(ends, match=said), supervised(run, process()):
            if signals:
                signal.raise_signal(signal.SIGTERM)
            raise DistNetworkError("Failed to recv, got 0 bytes")
        assert json.loads((tmp_path / "status.json").read_text())["status"] == word


def test_other_ranks_and_folders_that_are_not_there_are_left_alone(tmp_path):
    RunStatus(tmp_path, is_main=False).reached(1)
    RunStatus(tmp_path / "absent", is_main=True).reached(1)
    assert not list(tmp_path.iterdir())
