"""A launch of several ranks says one sentence: the rank that fails first tells the others, whatever its error is."""

import os

import pytest
import torch
import torch.distributed as dist

from isotune.distributed import ranks, telling
from isotune.distributed.launch import Process
from isotune.distributed.telling import of_launch
from isotune.io.errors import (
    Preempted,
    RankError,
    RankFault,
    RunFault,
    Superseded,
    UserError,
    end_process,
    explain_by,
    run_script,
)

LOST = RuntimeError("Connection closed by peer [127.0.0.1]:1")


class Launch:
    """Two ranks that reach one store; `rank` is the one that speaks."""

    def __init__(self) -> None:
        self.store, self.rank, self.gone = dist.HashStore(), 0, None

    def fails(self, rank: int, error: Exception, *, where: str = "") -> Exception:
        """What a rank raises in the place of an error."""
        self.rank = rank
        return of_launch(error, find_gone=lambda: self.gone, where=where)


@pytest.fixture
def launch(monkeypatch):
    launch = Launch()
    telling.connect.cache_clear()
    monkeypatch.setattr(telling, "several_ranks", lambda: True)
    monkeypatch.setattr(telling, "clone_default_store", lambda prefix: dist.PrefixStore(prefix, launch.store))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: launch.rank)
    yield launch
    telling.connect.cache_clear()


@pytest.mark.parametrize("error", [UserError("the disk is full"), RunFault("it leaks"), Superseded("taken over")])
def test_an_expected_error_of_one_rank_is_what_the_others_end_with_and_one_prints_it(launch, error):
    first = launch.fails(0, error)
    assert first is error and error.prints is True
    second = launch.fails(1, LOST, where="; see the log")
    assert str(second) == str(error) and second.prints is False
    assert isinstance(second, RankError if isinstance(error, UserError) else RankFault)


def test_where_all_ranks_raise_the_same_the_first_prints_and_again_does(launch):
    errors = [UserError("row 3 is empty") for _ in range(2)]
    for rank in (1, 0, 1):
        assert launch.fails(rank, errors[rank]) is errors[rank]
    assert [error.prints for error in errors] == [False, True]


def test_an_unexpected_error_names_its_rank_and_a_stop_of_all_ranks_is_told_to_nobody(launch):
    stopped = Preempted("stopped after step 3")
    assert launch.fails(1, stopped) is stopped and stopped.prints is None
    fault = launch.fails(1, KeyError("a bug"), where="; its traceback is in FILE")
    assert isinstance(fault, RankFault) and fault.prints is True
    assert str(fault).startswith("rank 1 on ") and str(fault).endswith(
        "failed with KeyError: 'a bug'; its traceback is in FILE"
    )
    assert str(launch.fails(0, LOST)) == str(fault)


def test_without_a_log_an_unexpected_error_keeps_its_traceback_and_the_others_name_it(launch):
    bug = KeyError("a bug")
    assert launch.fails(1, bug) is bug
    assert "failed with KeyError: 'a bug'" in str(launch.fails(0, LOST))


def test_a_rank_that_told_nobody_is_named_by_the_one_that_looked(launch):
    launch.gone = "rank 1 on far is gone, killed or cut off: last in step 3"
    found = launch.fails(0, LOST, where="; see the log")
    assert str(found) == launch.gone and found.prints is True
    assert str(launch.fails(2, LOST)) == launch.gone


def test_the_script_and_the_end_of_a_process_say_what_the_launch_agrees_on(launch, monkeypatch, capfd):
    monkeypatch.setattr(os, "_exit", lambda status: None)
    explain_by(lambda error, where="": launch.fails(launch.rank, error))
    try:
        end_process("output_dir 'run' is gone")
        launch.rank = 1
        end_process("output_dir 'run' is gone too")
        with pytest.raises(SystemExit) as leaving:
            run_script(lambda: (_ for _ in ()).throw(LOST))
    finally:
        explain_by(None)
    assert leaving.value.code == 1 and capfd.readouterr().err == "error: output_dir 'run' is gone\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "RUN/metrics.jsonl"), KeyError("a bug")])
def test_whatever_the_main_process_raises_alone_is_an_error_of_every_rank(monkeypatch, error):
    sent = []
    monkeypatch.setattr(ranks, "several_ranks", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda outcome, **_: sent.extend(outcome))

    def call() -> None:
        raise error

    expected = UserError if isinstance(error, OSError) else KeyError
    with pytest.raises(expected):
        ranks.call_on_main(Process(0, 2, torch.device("cpu")), call)
    (told,) = sent
    assert isinstance(told, UserError if isinstance(error, OSError) else RankFault) and not told.prints
    monkeypatch.setattr(dist, "broadcast_object_list", lambda outcome, **_: outcome.__setitem__(0, told))
    with pytest.raises(type(told)):
        ranks.call_on_main(Process(1, 2, torch.device("cpu")), call)
