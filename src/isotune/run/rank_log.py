"""RUN/logs/rank-N.log: what one process of a launch of several has to say, apart from the others.

While a run trains and saves, it has what libraries log as warnings, the stack of a crash, and the traceback of an error
that nobody expected. The terminal has one sentence instead, of the rank that failed first: what the others run into
then follows from it.
"""

import contextlib
import faulthandler
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from isotune.distributed.ranks import tell_ranks, told_by_ranks
from isotune.io.errors import OfOneRank, OneSentence, RankFault, as_user_error, first_line
from isotune.io.run_files import LOGS_DIR

LOGGERS = ("accelerate", "datasets", "DeepSpeed", "peft", "torch", "transformers", "trl")
# how gloo and NCCL say that a process is gone
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
)


@contextlib.contextmanager
def rank_log(run: Path, rank: int, world_size: int) -> Iterator[None]:
    """Keep the log of a rank while the body runs; nothing where there is one process, or where RUN is not seen.

    Raises RankFault in the place of an error that is not one sentence yet.
    """
    file = run / LOGS_DIR / f"rank-{rank}.log"
    stream = _opened(file) if world_size > 1 else None
    if stream is None:
        yield
        return
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    elsewhere = faulthandler.is_enabled()
    faulthandler.enable(stream)
    try:
        with contextlib.suppress(OSError):  # a log ends no run, on a full disk either
            stream.write(f"{began} rank {rank} of {world_size} on {socket.gethostname()}, process {os.getpid()}\n")
            stream.flush()
        yield
    except Exception as error:
        expected = isinstance(error, OneSentence) or as_user_error(error) is not None
        with contextlib.suppress(OSError):
            if expected:
                stream.write(f"{type(error).__name__}: {error}\n")
            else:
                traceback.print_exc(file=stream)
        if expected:
            raise
        raise _fault(error, rank, file) from error
    finally:
        faulthandler.enable() if elsewhere else faulthandler.disable()
        for logger in loggers:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            stream.close()


def _opened(file: Path) -> TextIO | None:
    try:
        file.parent.mkdir(exist_ok=True)
        return file.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError:  # a machine that does not see RUN
        return None


def _fault(error: Exception, rank: int, file: Path) -> OfOneRank:
    """What the launch says of it: the first rank that failed tells the others."""
    line = first_line(error)
    what = f"failed with {type(error).__name__}: {line}"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
        what = f"lost another rank, which its launcher names ({line})"
    own = RankFault(f"rank {rank} on {socket.gethostname()} {what}; its traceback is in {file}", prints=True)
    told = told_by_ranks() or own
    own.prints = told is own and tell_ranks(own)
    return told
