"""metrics.jsonl: one line an optimizer update and one an evaluation, flushed as they come."""

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class MetricsFile:
    """Appends JSON lines; only the main process has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line. NaN and infinity, which JSON does not know, are written as null."""
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
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
