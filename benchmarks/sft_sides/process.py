"""A side's process: it builds its trainer, then trains as many steps as a pipe tells it to, and waits in between.

Nothing heavy is imported at the top: the parent imports this module, and holds no library of the sides in memory.
"""

import importlib
import os
import re
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MODULES = {"isotune": "isotune_side", "drop_in": "drop_in_side", "floor": "floor_side", "floor_linear": "floor_side"}


class Finished(SystemExit):
    """Unwinds a training loop that is not needed any more."""


def run_side(pipe: Connection, side: str, mode: str, given: Namespace, scratch: str, module: str | None = None) -> None:
    """The main function of a side's process; `module` holds the side, by default the one in this package.

    Sends `{"failed": reason}` where the side cannot run; else what `Metronome` sends.
    """
    with open(Path(scratch) / f"{mode}-{side}.log", "w") as log:  # libraries talk to the file descriptors
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        module = module or f"sft_sides.{MODULES.get(side, 'trl_side')}"
        importlib.import_module(module).run(Metronome(pipe), side, mode, given, scratch)
    except Finished:
        return
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        pipe.send({"failed": f"{type(error).__name__}: {lines[0]}"})
        raise


class Metronome:
    """Holds a loop at its `beat` until the pipe brings a number of steps; 0 ends it.

    Every hold sends the seconds of each step since the last one, from its beginning to that of the next, and the most
    memory that was held meanwhile; the first, before any step, also sends the side's facts.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.wanted = 0
        self.seconds: list[float] = []
        self.started: float | None = None

    def beat(self, facts: Callable[[], dict[str, Any]]) -> None:
        """To be called where a step begins; `facts` is asked for at the first call."""
        import torch

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        if self.started is not None:
            self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) == self.wanted:
            first = facts() if self.started is None else {}
            peak = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
            self.pipe.send({"seconds": self.seconds, "peak_memory_bytes": peak, **first})
            self.wanted, self.seconds = self.pipe.recv(), []
            if not self.wanted:
                raise Finished
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                forget_peak()
        self.started = time.perf_counter()


def peak_resident_bytes() -> int:
    """The most memory that this process has held since `forget_peak`, where the system can forget, else ever."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Count the peak anew from what is held now (Linux: proc(5), clear_refs)."""
    reset = Path("/proc/self/clear_refs")
    if os.access(reset, os.W_OK):
        reset.write_text("5")
