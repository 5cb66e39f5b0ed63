"""logs/rank-N.log: what one process of a launch of several has to say, apart from the others.

While a run trains and saves, or rows are evaluated or predicted, it has what libraries log as warnings, the stack of a
crash, and the traceback of an error that nobody expected. The terminal has one sentence instead, of the rank that
failed first: what the others run into then follows from it.
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

from isotune.io.errors import OneSentence, explain
from isotune.io.reading import leads_out

LOGGERS = ("accelerate", "datasets", "DeepSpeed", "peft", "torch", "transformers", "trl")


@contextlib.contextmanager
def rank_log(file: Path, rank: int, world_size: int) -> Iterator[None]:
    """Keep the log of a rank while the body runs; nothing for one process, or where the folder's parent is not seen.

    Raises what the launch agrees on in the place of an error: see `isotune.distributed.telling`.
    """
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
        with contextlib.suppress(OSError):
            if isinstance(error, OneSentence):
                stream.write(f"{type(error).__name__}: {error}\n")
            else:
                traceback.print_exc(file=stream)
            stream.flush()
        said = explain(error, where=f"; its traceback is in {file}")
        if said is error:
            raise
        raise said from error
    finally:
        faulthandler.enable() if elsewhere else faulthandler.disable()
        for logger in loggers:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            stream.close()


def _opened(file: Path) -> TextIO | None:
    if leads_out(file, file.parent.parent):  # a run of somebody else's may have a link to a file of the user's
        return None
    try:
        file.parent.mkdir(exist_ok=True)
        return file.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError:  # a machine that does not see RUN
        return None
