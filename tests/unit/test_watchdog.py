"""The watchdog names the rank that hangs, by what each rank did and by whose thread fell silent."""

import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from isotune.distributed.ranks import Watchdog

TIMEOUT_SECONDS = 1.0


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
            "no rank has made progress for 1 s (ddp_timeout): rank 1 hangs in step 1, and the others wait"
        )


def test_a_rank_whose_thread_fell_silent_is_named_though_all_did_the_same():
    def drive(dogs: list[Watchdog]) -> None:
        for dog in dogs:
            dog.progress("step 7")
        time.sleep(0.3)
        dogs[0]._stopped.set()  # as SIGSTOP would

    said = watched(2, drive)
    assert said[0] == []
    assert said[1] == ["no rank has made progress for 1 s (ddp_timeout): rank 0 hangs in step 7, and the others wait"]


def test_where_nothing_tells_them_apart_it_says_so():
    said = watched(2, lambda dogs: [dog.progress("step 7") for dog in dogs] and None)
    for sentences in said:
        (sentence,) = sentences
        assert sentence.endswith("all 2 wait in step 7, and nothing tells which of them hangs")


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_one_rank_that_moves_is_progress(slow_rank):
    def drive(dogs: list[Watchdog]) -> None:
        for step in range(8):  # twice the time in which a rank must move
            dogs[1 - slow_rank].progress(f"step {step}")
            time.sleep(TIMEOUT_SECONDS / 4)
        for dog in dogs:
            dog.stop()

    assert watched(2, drive) == [[], []]
