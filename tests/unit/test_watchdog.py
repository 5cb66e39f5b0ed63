"""The watchdog names the rank that hangs, by what each rank did and by whose thread fell silent."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from isotune.distributed import rendezvous, watchdog
from isotune.distributed.rendezvous import NetworkInterface, Rendezvous
from isotune.distributed.watchdog import Place, Watchdog

TIMEOUT_SECONDS = 1.0
HOST = socket.gethostname()


def watched(world_size: int, drive: Callable[[list[Watchdog]], None]) -> list[list[str]]:
    """What each of `world_size` watchdogs in this process says after `drive` moved them, once those that run spoke."""
    store, said = dist.HashStore(), [[] for _ in range(world_size)]
    dogs = [Watchdog(TIMEOUT_SECONDS, on_timeout=said[rank].append) for rank in range(world_size)]
    for rank, dog in enumerate(dogs):
        dog.watch(store, rank, world_size)
    drive(dogs)
    deadline = time.monotonic() + 20 * TIMEOUT_SECONDS
    while time.monotonic() < deadline and any(
        not spoken and not dog._stopped.is_set() for dog, spoken in zip(dogs, said, strict=True)
    ):
        time.sleep(0.05)
    for dog in dogs:
        dog.stop()
    return said


def test_the_rank_that_did_least_is_named_by_every_rank():
    def drive(dogs: list[Watchdog]) -> None:
        for rank, dog in enumerate(dogs):
            dog.progress("step 1")
            if rank != 1:
                dog.progress("step 2")

    for sentences in watched(3, drive):
        (sentence,) = sentences
        assert sentence == (
            f"no rank has made progress for 1 s (ddp_timeout): rank 1 on {HOST} hangs in step 1, and the others wait"
        )


def test_a_rank_whose_thread_fell_silent_is_named_though_all_did_the_same():
    def drive(dogs: list[Watchdog]) -> None:
        for dog in dogs:
            dog.progress("step 7")
        time.sleep(0.3)
        dogs[0]._stopped.set()  # as SIGSTOP would

    said = watched(2, drive)
    assert said[0] == []
    assert said[1] == [
        f"no rank has made progress for 1 s (ddp_timeout): rank 0 on {HOST} hangs in step 7, and the others wait"
    ]


def test_where_nothing_tells_them_apart_it_says_so():
    said = watched(2, lambda dogs: [dog.progress("step 7") for dog in dogs] and None)
    for sentences in said:
        (sentence,) = sentences
        assert sentence.endswith("all 2 wait in step 7, and nothing tells which of them hangs")


@pytest.mark.parametrize("slow_rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_rank_that_moves_is_progress(slow_rank):
    def drive(dogs: list[Watchdog]) -> None:
        for step in range(8):  # twice the time in which a rank must move
            dogs[1 - slow_rank].progress(f"step {step}")
            time.sleep(TIMEOUT_SECONDS / 4)
        for dog in dogs:
            dog.stop()

    assert watched(2, drive) == [[], []]


class Counting:
    """A store that counts what is read from it."""

    def __init__(self, store) -> None:
        self.store, self.read = store, 0

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def multi_get(self, names):
        """As the store's."""
        self.read += len(names)
        return self.store.multi_get(names)


def watch(store, rank: int, world_size: int) -> tuple[Watchdog, list[str]]:
    said = []
    dog = Watchdog(TIMEOUT_SECONDS, on_timeout=said.append)
    dog.watch(store, rank, world_size)
    return dog, said


def beat(store, rank: int, seconds: float) -> None:
    """The life signs of a rank that prepares its data, for so long."""
    other = Watchdog(TIMEOUT_SECONDS)
    other._store, other._rank, other._own = store, rank, Place("far", "the preparation of the data")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        other._write()
        time.sleep(0.1)


def wait_for(said: list[str], seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not said:
        time.sleep(0.05)
    return said


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_phase_without_steps_takes_as_long_as_it_takes_and_a_rank_that_falls_silent_in_it_is_named(rank):
    store = dist.HashStore()
    dog, said = watch(store, rank, 2)
    dog.enter("the preparation of the data")
    beat(store, 1 - rank, 2 * TIMEOUT_SECONDS)
    assert said == []
    (sentence,) = wait_for(said, 20 * TIMEOUT_SECONDS)
    assert sentence == (
        f"a rank shows no sign of life for 1 s (ddp_timeout): rank {1 - rank} on far hangs in the preparation of the "
        "data, and the others wait"
    )
    dog.stop()


def test_a_rank_whose_work_is_over_may_be_silent_and_one_that_waits_for_the_main_rank_goes_on_at_its_end():
    store = dist.HashStore()
    (main, said), (other, _) = watch(store, 0, 2), watch(store, 1, 2)
    other.stop()
    time.sleep(2 * TIMEOUT_SECONDS)
    assert said == []
    late, _ = watch(store, 1, 2)
    asked = []
    late.wait_for_main(lambda: len(asked) == 3 or bool(asked.append("not yet")))
    main.stop()
    late.wait_for_main(lambda: False)
    late.stop()
    assert len(asked) == 3


def test_a_rank_that_was_killed_is_named_by_host_and_place():
    store = dist.HashStore()
    dog, _ = watch(store, 0, 3)
    alive, _ = watch(store, 2, 3)
    beat(store, 1, 0.3)
    assert dog.find_gone() == "rank 1 on far is gone, killed or cut off: last in the preparation of the data"
    dog.stop()
    alive.stop()


def test_nobody_is_gone_where_the_others_live_or_have_ended_and_those_who_ask_too_wait_for_no_timeout():
    store = dist.HashStore()
    dogs = [watch(store, rank, 3)[0] for rank in range(3)]
    dogs[2].stop()
    began = time.monotonic()
    assert [dog.find_gone() for dog in dogs[:2]] == [None, None]
    assert time.monotonic() - began < 5 * dogs[0]._pause, "a heartbeat, and what the first one found"
    for dog in dogs[:2]:
        dog.stop()


def test_the_main_rank_reads_every_rank_and_the_others_read_the_main_one():
    store, ranks = dist.HashStore(), 50
    for rank in range(ranks):
        store.set(str(rank), "{}")
    main, other = Counting(store), Counting(store)
    dogs = [watch(main, 0, ranks)[0], watch(other, 7, ranks)[0]]
    time.sleep(3 * dogs[0]._pause)
    for dog in dogs:
        dog.stop()
    assert main.read >= ranks and 0 < other.read < ranks / 2


@pytest.fixture
def launcher(monkeypatch) -> Iterator[tuple[int, int]]:
    """A process that holds the store of a launch, as its launcher does, and the port of that store."""
    for module in (rendezvous, watchdog):
        monkeypatch.setattr(module, "LAUNCHER_SECONDS", 0.5)
    reads, writes = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writes, f"{store.port}\n".encode())
        signal.pause()
    yield launcher, int(os.read(reads, 20))
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)


def until(said: list[str], seconds: float) -> list[str]:
    """What is said, once something is or this time is over."""
    deadline = time.monotonic() + seconds
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
    return said


def test_a_rank_whose_launcher_was_killed_before_the_first_step_ends_by_itself(launcher):
    process, port = launcher
    said: list[list[str]] = [[], []]
    dogs = [Watchdog(TIMEOUT_SECONDS, on_timeout=own.append) for own in said]
    for rank, dog in enumerate(dogs):
        dog.watch(dist.TCPStore("localhost", port, is_master=False), rank, 2)
    dogs[0].enter("the preparation of the data")
    dogs[1].progress("step 1")  # which saves what there is to save when the launcher's end reaches it
    os.kill(process, signal.SIGKILL)
    assert until(said[0], 20) == [
        f"rank 0 on {HOST} lost its launch in the preparation of the data: the launcher was killed or is cut off"
    ]
    assert until(said[1], 1.0) == []


def test_a_rank_whose_launcher_was_killed_while_the_others_come_ends_by_itself(launcher):
    process, port = launcher
    said: list[str] = []
    settings = {"rank": 0, "world_size": 2, "timeout_seconds": 60.0, "interface": NetworkInterface()}
    connect = lambda: dist.TCPStore("localhost", port, is_master=False)  # noqa: E731
    with Rendezvous(connect, **settings, on_timeout=said.append) as meeting:
        while meeting._store is None:
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
        assert until(said, 20) == [
            f"rank 0 on {HOST} lost its launch before all ranks met: the launcher was killed or is cut off"
        ]
