"""The one sentence of a launch of several ranks: the first rank that fails tells the others, and prints.

What the others run into then follows from it, such as a connection that broke: they end with the same sentence, and
silently.
"""

import functools
import socket
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from isotune.compat.torch import clone_default_store
from isotune.distributed.ranks import several_ranks
from isotune.io.errors import (
    AlreadyDone,
    OfOneRank,
    OneSentence,
    Preempted,
    RankError,
    RankFault,
    UserError,
    first_line,
)

# how gloo and NCCL say that a process is gone
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
)
_TOLD = "error"


@functools.cache
def connect() -> Store:
    """The store of what is told; `Watchdog.start` connects to it, because later the launcher may be gone.

    An operation on a store that is gone fails at once. To connect to it takes longer than the timeout of the process
    group, in a call that no signal ends.
    """
    return clone_default_store("isotune/told")


def tell_ranks(error: Exception) -> bool:
    """Leave the others the error of this rank, which ends; whether it is the first of the launch to do so."""
    if not several_ranks():
        return True
    try:
        return tell(connect(), dist.get_rank(), error)
    except RuntimeError:  # the store is gone with the launcher
        return True


def tell(store: Store, rank: int, error: Exception) -> bool:
    """`tell_ranks` through a store that all ranks reach; once more by the same rank it says the same."""
    kind = RankError if isinstance(error, UserError) else RankFault
    reason = (error.reason if isinstance(error, OneSentence) else None) or "-"
    # by one operation: whoever finds it finds all of it
    first = store.compare_set(_TOLD, "", f"{rank} {kind.__name__} {reason} {error}").decode()
    return first.split(" ", 1)[0] == str(rank)


def told_by_ranks() -> OfOneRank | None:
    """What another rank has told before it ended, for the rank whose communication breaks; None where none has."""
    if not several_ranks():
        return None
    try:
        return told(connect())
    except RuntimeError:  # the store is gone with the launcher
        return None


def told(store: Store) -> OfOneRank | None:
    """`told_by_ranks` through a store that all ranks reach."""
    if not store.check([_TOLD]):
        return None
    _, kind, reason, sentence = store.get(_TOLD).decode().split(" ", 3)
    reason = None if reason == "-" else reason
    return (RankError if kind == RankError.__name__ else RankFault)(sentence, reason=reason)


def is_lost(error: Exception) -> bool:
    """Whether this is how a rank notices that another process is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def of_launch(error: Exception, *, find_gone: Callable[[], str | None], where: str = "") -> Exception:
    """What this rank raises in the place of `error`, once it has told the others or was told by them.

    An error of one sentence is itself, with `prints` true on the first rank alone. Any other is a RankFault, which ends
    in `where`, or without that itself. `find_gone` names the ranks that are gone, where the communication broke.
    """
    if isinstance(error, AlreadyDone | Preempted):  # all ranks together
        return error
    if isinstance(error, OneSentence):
        error.prints = error.prints is not False and tell_ranks(error)
        return error
    here = f"rank {dist.get_rank() if dist.is_initialized() else 0} on {socket.gethostname()}"
    own = RankFault(f"{here} failed with {type(error).__name__}: {first_line(error)}{where}", prints=True)
    if is_lost(error):
        earlier = told_by_ranks()
        gone = find_gone() if earlier is None else None
        if earlier := earlier or told_by_ranks():
            return earlier
        unnamed = f"{here} lost another rank, which its launcher names ({first_line(error)})"
        own = RankFault(gone or unnamed, prints=True)
    elif not where:
        tell_ranks(own)  # its traceback is what this rank prints
        return error
    own.prints = tell_ranks(own)
    return own if own.prints else told_by_ranks() or own
