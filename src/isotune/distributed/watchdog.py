"""Names the rank that hangs or is gone, by its host and by what it did last, from the start of a launch to its end.

A collective waits for a lost rank as long as its backend allows, and its error does not say which rank is lost. So a
thread of every rank writes what the rank does into the launch's store, with a heartbeat. Rank 0 reads all of them, and
the others read rank 0's: a launch of N ranks costs O(N) reads.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from isotune.compat.torch import clone_default_store
from isotune.distributed.ranks import several_ranks
from isotune.distributed.rendezvous import LAUNCHER_SECONDS
from isotune.distributed.telling import connect, of_launch, told_by_ranks
from isotune.io.errors import RankFault, end_process, explain_by, outcome_of

DEFAULT_TIMEOUT_SECONDS = 1800.0  # of a launch without a recipe, whose `ddp_timeout` it is otherwise
_CHECKS_PER_TIMEOUT = 10
_MAX_PAUSE_SECONDS = 2.0
_VERDICT, _SEARCH, _SEARCHED = "verdict", "search", "searched"


@dataclass
class Place:
    """What a rank does, as the store has it."""

    host: str = ""
    phase: str = "its start"
    is_timed: bool = False  # a phase in which every rank makes progress, such as the steps
    has_ended: bool = False
    count: int = 0  # of its progress
    heartbeat: int = 0

    def named(self, rank: int) -> str:
        """As a sentence names the rank."""
        return f"rank {rank} on {self.host}" if self.host else f"rank {rank}"


@dataclass(eq=False)
class Watchdog:
    """Ends the launch when no rank makes progress, or one shows no sign of life, for `timeout_seconds`.

    The steps are timed: when no count has changed for the whole timeout, the rank with the lowest count hangs. If all
    counts are equal, a rank hangs whose own thread has stopped writing, as that of a stopped process does. Other
    phases, such as the preparation of the data, take as long as they take, and only that thread is watched. Nothing is
    watched on a single rank.
    """

    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    on_timeout: Callable[[str], Any] = end_process  # takes the sentence
    _own: Place = field(default_factory=lambda: Place(socket.gethostname()), init=False)
    _rank: int = field(default=0, init=False)
    _world_size: int = field(default=1, init=False)
    _store: Store | None = field(default=None, init=False)
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _is_ending: bool = field(default=False, init=False)  # this process, with a sentence
    _has_progressed: bool = field(default=False, init=False)

    def start(self) -> None:
        """Start watching through the launch's store, until `stop` or the end of this process.

        From now on an error of this rank is told to the others, and where the communication breaks the lost rank named.
        """
        if several_ranks():
            connect()
            explain_by(self._explain)
            self.watch(clone_default_store("isotune/progress"), dist.get_rank(), dist.get_world_size())
            atexit.register(self.stop)

    def watch(self, store: Store, rank: int, world_size: int) -> None:
        """Start watching `world_size` ranks, as `rank`, through a store that all of them reach."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, phase: str | None = None) -> None:
        """Report progress in a timed phase; `phase` is what this rank does next, such as `step 7`; None: the same."""
        self._own.count += 1
        self._own.phase, self._own.is_timed = phase or self._own.phase, True
        self._has_progressed = True

    def enter(self, phase: str) -> None:
        """Begin a phase that takes as long as it takes."""
        self._own.count += 1
        self._own.phase, self._own.is_timed = phase, False

    def stop(self) -> None:
        """This rank's work is over: stop watching, and let the others know that it will be silent."""
        if self._stopped.is_set() or self._thread is None:
            return
        self._stopped.set()
        self._thread.join(timeout=2 * _MAX_PAUSE_SECONDS)
        if not self._thread.is_alive():
            self._own.has_ended = True
            with contextlib.suppress(Exception):  # the store ends with the launcher
                self._write()

    def wait_for_main(self, until: Callable[[], bool]) -> None:
        """Wait on another rank for the end of rank 0, which works alone; or until `until` says so.

        The store is asked less and less often, down to once a heartbeat: all other ranks wait at once.
        """
        pause, ask_at = 0.1, time.monotonic()
        while self._store is not None and self._rank and not until() and not self._stopped.wait(0.1):
            if time.monotonic() < ask_at:
                continue
            pause = min(2 * pause, self._pause)
            ask_at = time.monotonic() + pause
            try:
                if self._read([0])[0].has_ended:
                    return
            except Exception:  # the store ends with the launcher
                return

    def find_gone(self) -> str | None:
        """The sentence for ranks whose heartbeat is gone, on the rank that lost them; None where none is missing.

        One rank looks, which takes two heartbeats; the others wait for what it tells.
        """
        if self._store is None:
            return None
        patience = 2 * self._pause + 0.5
        try:
            if self._store.add(_SEARCH, 1) == 1:
                gone = self._without_heartbeat(patience)
                self._store.set(_SEARCHED, "")
            else:
                gone = {}
                self._wait(2 * patience, lambda: self._has(_SEARCHED) or told_by_ranks() is not None)
        except Exception:  # the store ends with the launcher
            return None
        if not gone:
            return None
        names, are = _listed([place.named(rank) for rank, place in gone.items()]), "is" if len(gone) == 1 else "are"
        return f"{names} {are} gone, killed or cut off: last in {next(iter(gone.values())).phase}"

    @contextlib.contextmanager
    def explaining_stops(self) -> Iterator[None]:
        """Within it SIGTERM, by which a launcher also ends the ranks that are left, first asks whether one is gone.

        Then this process ends with the sentence that names it, or with the one that another rank has told. Else the
        signal does what it did before.
        """
        before = signal.getsignal(signal.SIGTERM)
        is_main_thread = threading.current_thread() is threading.main_thread()
        if self._thread is None or not is_main_thread or before in (None, signal.SIG_IGN):
            yield
            return
        signal.signal(signal.SIGTERM, functools.partial(self._on_stop, before))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_stop(self, before: Any, number: int, frame: Any) -> None:
        if self._is_ending:
            return
        self._is_ending = True
        self.stop()  # first: a rank that was told to stop is not gone
        gone = self.find_gone() if told_by_ranks() is None else None
        if (error := told_by_ranks() or (RankFault(gone) if gone else None)) is not None:
            end_process(str(error), *outcome_of(error))
        signal.signal(number, before)
        os.kill(os.getpid(), number)

    def _explain(self, error: Exception, *, where: str = "") -> Exception:
        self._is_ending = True
        return of_launch(error, find_gone=self.find_gone, where=where)

    def _without_heartbeat(self, seconds: float) -> dict[int, Place]:
        """The other ranks that neither end nor show a sign of life within this time, by number."""
        before = self._read(range(self._world_size))
        silent = {rank: place for rank, place in before.items() if rank != self._rank}

        def none_is_silent() -> bool:
            for rank, place in self._read(list(silent)).items():
                if place.has_ended or place.heartbeat != before[rank].heartbeat:
                    del silent[rank]
            return not silent

        self._wait(seconds, none_is_silent)
        return silent

    def _wait(self, seconds: float, until: Callable[[], bool]) -> None:
        """Ask several times a heartbeat, and once at the end."""
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline:
            time.sleep(min(self._pause / 10, 0.1))

    def _has(self, name: str) -> bool:
        assert self._store is not None
        return self._store.check([name])

    @property
    def _pause(self) -> float:
        """Seconds between two heartbeats."""
        return min(self.timeout_seconds / _CHECKS_PER_TIMEOUT, _MAX_PAUSE_SECONDS)

    def _write(self) -> None:
        assert self._store is not None
        self._own.heartbeat += 1
        self._store.set(str(self._rank), json.dumps(asdict(self._own)))

    def _read(self, ranks: Iterable[int]) -> dict[int, Place]:
        assert self._store is not None
        store: Any = self._store  # the stubs lack has_extended_api
        names = [str(rank) for rank in ranks]
        if store.check(names) and store.has_extended_api():  # two requests, however many ranks
            texts = list(store.multi_get(names))
        else:
            texts = [store.get(name) if store.check([name]) else b"{}" for name in names]
        return {int(name): Place(**json.loads(text)) for name, text in zip(names, texts, strict=True)}

    def _watch(self) -> None:
        watched = [*range(self._world_size)] if self._rank == 0 else [0, self._rank]
        ranks = {rank: _Watched(Place()) for rank in watched}
        checked_at = time.monotonic()
        assert self._store is not None
        while True:
            try:
                self._write()
                if self._rank and self._has(_VERDICT):
                    self.on_timeout(self._store.get(_VERDICT).decode())
                    return
                places = self._read(watched)
            except Exception:
                self._lost_store()
                return
            now = time.monotonic()
            if (slept := now - checked_at - self._pause) > 3 * self._pause:  # this process itself was stopped
                for watching in ranks.values():
                    watching.forgive(slept)
            checked_at = now
            for rank, place in places.items():
                ranks[rank].update(place, now)
            if sentence := self._diagnosis(ranks, now):
                with contextlib.suppress(Exception):
                    self._store.set(_VERDICT, sentence)
                self.on_timeout(sentence)
                return
            if self._stopped.wait(self._pause):
                return

    def _lost_store(self) -> None:
        """The store has gone with the launcher, which ends this process too, unless somebody killed it.

        Before its first step a process may be making process groups. It then asks the dead store again and again, for
        longer than `ddp_timeout`, in a call that no signal ends; so this thread ends it. A step that came meanwhile is
        saved first.
        """
        if not self._stopped.wait(LAUNCHER_SECONDS) and not self._has_progressed:
            here = self._own.named(self._rank)
            self.on_timeout(f"{here} lost its launch in {self._own.phase}: the launcher was killed or is cut off")

    def _diagnosis(self, ranks: "dict[int, _Watched]", now: float) -> str | None:
        """The sentence for a launch that hangs, as this rank sees it; None while it does not."""
        ranks = {rank: watching for rank, watching in ranks.items() if not watching.place.has_ended}
        limit = f"for {self.timeout_seconds:g} s (ddp_timeout)"
        stands = bool(ranks) and all(
            watching.place.is_timed and now - watching.advanced_at > self.timeout_seconds for watching in ranks.values()
        )
        max_silence = max(3 * self._pause, self.timeout_seconds / 2) if stands else self.timeout_seconds
        suspects = [rank for rank, watching in ranks.items() if now - watching.heartbeat_at > max_silence]
        if not suspects and (self._rank or not stands):  # what is no silence is for rank 0, which sees all
            return None
        if not suspects:
            lowest = min(watching.place.count for watching in ranks.values())
            suspects = [rank for rank, watching in ranks.items() if watching.place.count == lowest]
        what = f"no rank has made progress {limit}" if stands else f"a rank shows no sign of life {limit}"
        phase = ranks[suspects[0]].place.phase
        if len(suspects) == len(ranks):
            return f"{what}: all {len(ranks)} wait in {phase}, and nothing tells which of them hangs"
        names = _listed([ranks[rank].place.named(rank) for rank in suspects])
        return f"{what}: {names} hangs in {phase}, and the others wait"


def _listed(names: list[str], most: int = 8) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return " and ".join([*names[:most], *more])


class _Watched:
    """A rank's last place, and when its progress count and its heartbeat last changed."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.advanced_at = self.heartbeat_at = time.monotonic()

    def update(self, place: Place, now: float) -> None:
        if place.heartbeat != self.place.heartbeat:
            self.heartbeat_at = now
        if place.count != self.place.count:
            self.advanced_at = now
        self.place = place

    def forgive(self, seconds: float) -> None:
        """Leave time out in which nobody looked."""
        self.advanced_at += seconds
        self.heartbeat_at += seconds
