"""metrics.jsonl: one line an optimizer update and one an evaluation, flushed as they come."""

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from isotune.run.run_lease import RunLease


class MetricsFile:
    """Appends JSON lines; only the main process has one.

    A life that takes the run over puts another file under this name, so what was opened by the life before, whose
    fence still held then, is nobody's from that moment on.

    Raises:
        Superseded: this is not the run's newest life, when it opens the file or writes a line.
    """

    def __init__(self, path: Path, fence: RunLease | None = None) -> None:
        self.path = path
        self.fence = fence
        self._file = path.open("a", encoding="utf-8")
        self._check()

    def _check(self) -> None:
        if self.fence is not None:
            self.fence.check()

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line, if this life still holds the run; NaN and infinity, which JSON does not know, as null."""
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        self._check()
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further lines are a bug."""
        self._file.close()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on the CUDA device, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
