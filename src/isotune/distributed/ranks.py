"""What ranks tell each other while they train: numbers, and their progress, so that a rank that hangs is named."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from isotune.compat.torch import clone_default_store
from isotune.io.errors import OfOneRank, OneSentence, RankError, RankFault, end_process

T = TypeVar("T")
_CHECKS_PER_TIMEOUT = 10
_MAX_PAUSE_SECONDS = 5.0


def several_ranks() -> bool:
    """Whether this process belongs to a group of more than one rank."""
    return world_size() > 1


def world_size() -> int:
    """Ranks of the group that this process belongs to."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_by_number(values: dict[int, torch.Tensor], count: int, device: torch.device) -> list[float]:
    """One scalar of each of `count` microbatches, from the rank that has it: the same list on every rank.

    Each scalar comes from one rank and is added to zeros only, so the list does not depend on the number of ranks.
    `values` are this rank's by microbatch number, without microbatches of weight zero.
    """
    rows = {number: value.reshape(1) for number, value in values.items()}
    return gather_vectors(rows, count, 1, device)[:, 0].tolist()


def least_of_ranks(number: int, device: torch.device) -> int:
    """The smallest of the ranks' whole numbers."""
    least = torch.tensor(number, device=device)
    if several_ranks():
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def gather_vectors(values: dict[int, torch.Tensor], count: int, size: int, device: torch.device) -> torch.Tensor:
    """One vector of every row, from the rank that has it: float64 [count, size] on the CPU, the same on every rank.

    `values` are this rank's vectors, [size] each, by row. No row is on two ranks; a row on none is zero.
    """
    if device.type == "mps":  # which has no float64, and is one process
        device = torch.device("cpu")
    table = torch.zeros(count, size, dtype=torch.float64, device=device)
    if values:
        rows = torch.tensor(list(values), device=device)
        table[rows] = torch.stack([value.detach().to(device).double() for value in values.values()])
    if several_ranks():
        dist.all_reduce(table)
    return table.cpu()


def add_vectors(values: dict[int, torch.Tensor], count: int, size: int, device: torch.device) -> torch.Tensor:
    """`gather_vectors` of few rows without waiting for the device, where the result stays."""
    if device.type == "mps":  # which has no float64, and is one process
        device = torch.device("cpu")
    nothing = torch.zeros(size, dtype=torch.float64, device=device)
    rows = [values[row].detach().to(device).double() if row in values else nothing for row in range(count)]
    table = torch.stack(rows) if rows else nothing.new_zeros(0, size)
    if several_ranks():
        dist.all_reduce(table)
    return table


def gather_parts(own: dict[int, torch.Tensor], lengths: list[int], device: torch.device) -> list[torch.Tensor]:
    """One tensor [length, ...] of each place of `lengths`, from the rank that has it: the same bits on every rank.

    `own` are this rank's by place, float32, equal in all but their first axis.
    """
    trailing = [tuple(part.shape[1:]) for part in own.values()][:1]
    if several_ranks():
        shapes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, trailing)
        trailing = next(shape for shape in shapes if shape)
    table = torch.zeros(sum(lengths), *trailing[0], device=device)
    parts = list(table.split(lengths))
    for place, part in own.items():
        parts[place].copy_(part.detach())
    if several_ranks():
        dist.all_reduce(table)
    return [part.clone() for part in parts]


def ordered_sum(values: list[float]) -> float:
    """The correctly rounded sum, which is the same in any order (Shewchuk 1997); NaN and Inf propagate."""
    return math.fsum(values) if all(math.isfinite(v) for v in values) else sum(values)


def tell_ranks(error: OfOneRank) -> bool:
    """Leave the others the error of this rank, which ends alone; whether it is the first of the launch to do so."""
    if not several_ranks():
        return True
    try:
        store = clone_default_store("isotune/told")
        first = store.add("ranks", 1) == 1
        if first:
            store.set("error", f"{type(error).__name__} {error.reason or '-'} {error}")
    except RuntimeError:  # the store is gone with the launcher
        return True
    return first


def told_by_ranks() -> OfOneRank | None:
    """What another rank has told before it ended, for the rank whose communication breaks; None where none has."""
    if not several_ranks():
        return None
    try:
        store = clone_default_store("isotune/told")
        if not store.check(["error"]):
            return None
        kind, reason, sentence = store.get("error").decode().split(" ", 2)
    except RuntimeError:  # the store is gone with the launcher
        return None
    reason = None if reason == "-" else reason
    return (RankError if kind == RankError.__name__ else RankFault)(sentence, prints=False, reason=reason)


class Rank(Protocol):
    """A process of a launch that trains or evaluates."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        ...

    @property
    def device(self) -> torch.device:
        """Which its collectives take."""
        ...


def call_on_main(rank: Rank, call: Callable[[], T]) -> T:
    """Call on the main process only; every rank returns its result, or raises its error of one sentence."""
    outcome: list[Any] = [None]
    if rank.is_main:
        try:
            outcome = [call()]
        except OneSentence as error:
            outcome = [error]
    if several_ranks():
        dist.broadcast_object_list(outcome, src=0, device=rank.device)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


@dataclass(eq=False)
class Watchdog:
    """Ends the launch when no rank has made progress for `timeout_seconds`; does nothing on a single rank.

    A collective waits for a lost rank as long as its backend allows, and its error does not say which rank is lost. So
    each rank counts its progress in the launch's store, and a thread of every rank watches all counts. When no count
    has changed for the whole timeout, the rank with the lowest count hangs. If all counts are equal, a rank hangs whose
    own thread has stopped writing, as that of a stopped process does.
    """

    timeout_seconds: float  # the recipe's `ddp_timeout`
    on_timeout: Callable[[str], Any] = end_process  # takes the sentence
    _progress_count: int = field(default=0, init=False)
    _phase: str = field(default="its start", init=False)
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        """Start watching through the launch's store."""
        if several_ranks():
            self.watch(clone_default_store("isotune/progress"), dist.get_rank(), dist.get_world_size())

    def watch(self, store: Store, rank: int, world_size: int) -> None:
        """Start watching `world_size` ranks, as `rank`, through a store that all of them reach."""
        self._thread = threading.Thread(target=self._watch, args=(store, rank, world_size), daemon=True)
        self._thread.start()

    def progress(self, phase: str) -> None:
        """Report progress; `phase` is what this rank does next, such as `step 7`."""
        self._progress_count += 1
        self._phase = phase

    def stop(self) -> None:
        """Stop watching: what follows has no time limit."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=_MAX_PAUSE_SECONDS)

    def _watch(self, store: Store, rank: int, world_size: int) -> None:
        pause = min(self.timeout_seconds / _CHECKS_PER_TIMEOUT, _MAX_PAUSE_SECONDS)
        heartbeat = 0
        ranks = [_RankProgress() for _ in range(world_size)]
        while True:
            heartbeat += 1
            try:
                store.set(str(rank), f"{heartbeat} {self._progress_count} {self._phase}")
                for number, progress in enumerate(ranks):
                    if store.check([str(number)]):
                        progress.update(store.get(str(number)).decode())
            except Exception:  # the store ends with the launcher, which ends this process too
                return
            now = time.monotonic()
            if now - max(progress.advanced_at for progress in ranks) > self.timeout_seconds:
                max_silence = max(3 * pause, self.timeout_seconds / 2)
                self.on_timeout(self._diagnosis(ranks, [now - p.heartbeat_at > max_silence for p in ranks]))
                return
            if self._stopped.wait(pause):
                return

    def _diagnosis(self, ranks: "list[_RankProgress]", silent: list[bool]) -> str:
        lowest = min(progress.count for progress in ranks)
        suspected = silent if any(silent) else [progress.count == lowest for progress in ranks]
        suspects = [rank for rank, is_suspect in enumerate(suspected) if is_suspect]
        timeout = f"no rank has made progress for {self.timeout_seconds:g} s (ddp_timeout)"
        if len(suspects) == len(ranks):
            return f"{timeout}: all {len(ranks)} wait in {ranks[0].phase}, and nothing tells which of them hangs"
        names = " and ".join(f"rank {rank}" for rank in suspects)
        return f"{timeout}: {names} hangs in {ranks[suspects[0]].phase}, and the others wait"


class _RankProgress:
    """A rank's last entry in the store, and when its progress count and its heartbeat last changed."""

    def __init__(self) -> None:
        self.heartbeat = self.count = -1
        self.phase = "its start"
        self.advanced_at = self.heartbeat_at = time.monotonic()

    def update(self, entry: str) -> None:
        heartbeat, count, phase = entry.split(" ", 2)
        now = time.monotonic()
        if int(heartbeat) != self.heartbeat:
            self.heartbeat, self.heartbeat_at = int(heartbeat), now
        if int(count) != self.count:
            self.count, self.phase, self.advanced_at = int(count), phase, now
