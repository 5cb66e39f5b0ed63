"""metrics.jsonl: one line per optimizer update and one per evaluation, flushed at once."""

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

    A new attempt puts a copy in the place of this file, so lines that a stale attempt still appends to the file that
    it has open are in no directory.

    Raises:
        Superseded: this attempt is stale, when it opens the file or writes a line.
    """

    def __init__(self, path: Path, lease: RunLease | None = None) -> None:
        self.path = path
        self.lease = lease
        self._file = path.open("a", encoding="utf-8")
        self._check()

    def _check(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line; NaN and infinity, which JSON does not have, become null."""
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        self._check()
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further lines are a bug."""
        self._file.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the CUDA device, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
