"""A rank that hangs takes the others down within `ddp_timeout`, and is named.

A collective of a rank that is gone waits for as long as its backend likes, and when it gives up it does not know for
whom it waited. So every rank counts what it has done in the store that the launch already has, and a thread of its own
looks whether anything moves. When nothing has for the whole time, the rank that did least is the one that hangs; where
all did the same, the one whose thread fell silent, as a stopped process does.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Store

from isotune.io.errors import EXIT_FAULT

_LOOKS_PER_TIMEOUT = 10
_LONGEST_PAUSE_SECONDS = 5.0


class Watchdog:
    """Ends this process where no rank has made progress for `timeout_seconds`; does nothing on a single rank.

    Args:
        timeout_seconds: the recipe's `ddp_timeout`.
        end: what to do with the sentence; prints it and leaves the process where not given.
    """

    def __init__(self, timeout_seconds: float, end: Callable[[str], Any] | None = None) -> None:
        self.timeout_seconds = timeout_seconds
        self._end = end or _leave
        self._done = 0
        self._place = "its start"
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch, in the store of the launch."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            store: Any = distributed_c10d._get_default_store()
            private = distributed_c10d.PrefixStore("isotune/progress", store.clone())
            self.watch(private, dist.get_rank(), dist.get_world_size())

    def watch(self, store: Store, rank: int, world_size: int) -> None:
        """Begin to watch `world_size` ranks, this one being `rank`, in a store that all of them reach."""
        self._thread = threading.Thread(target=self._watch, args=(store, rank, world_size), daemon=True)
        self._thread.start()

    def progress(self, place: str) -> None:
        """Something was done; `place` says where this rank is now."""
        self._done += 1
        self._place = place

    def stop(self) -> None:
        """What follows may take its time."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=_LONGEST_PAUSE_SECONDS)

    def _watch(self, store: Store, rank: int, world_size: int) -> None:
        pause = min(self.timeout_seconds / _LOOKS_PER_TIMEOUT, _LONGEST_PAUSE_SECONDS)
        beats = 0
        others = [_Seen() for _ in range(world_size)]
        while True:
            beats += 1
            try:
                store.set(str(rank), f"{beats} {self._done} {self._place}")
                for number, seen in enumerate(others):
                    if store.check([str(number)]):
                        seen.update(store.get(str(number)).decode())
            except Exception:  # the store goes with the launcher, which ends this process too
                return
            now = time.monotonic()
            if now - max(seen.moved for seen in others) > self.timeout_seconds:
                silent = [now - seen.alive > max(3 * pause, self.timeout_seconds / 2) for seen in others]
                self._end(self._sentence(others, silent))
                return
            if self._stopped.wait(pause):
                return

    def _sentence(self, ranks: "list[_Seen]", silent: list[bool]) -> str:
        least = min(seen.done for seen in ranks)
        behind = [seen.done == least for seen in ranks]
        suspects = [r for r, is_so in enumerate(silent if any(silent) else behind) if is_so]
        waited = f"no rank has made progress for {self.timeout_seconds:g} s (ddp_timeout)"
        if len(suspects) == len(ranks):
            return f"{waited}: all {len(ranks)} wait in {ranks[0].place}, and nothing tells which of them hangs"
        named = " and ".join(f"rank {r}" for r in suspects)
        return f"{waited}: {named} hangs in {ranks[suspects[0]].place}, and the others wait"


class _Seen:
    """What the store last said of a rank: `moved` and `alive` are when its count and its thread's last changed."""

    def __init__(self) -> None:
        self.beat = self.done = -1
        self.place = "its start"
        self.moved = self.alive = time.monotonic()

    def update(self, written: str) -> None:
        beat, done, place = written.split(" ", 2)
        now = time.monotonic()
        if int(beat) != self.beat:
            self.beat, self.alive = int(beat), now
        if int(done) != self.done:
            self.done, self.place, self.moved = int(done), place, now


def _leave(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAULT)
