"""metrics.jsonl: one line per optimizer update and one per evaluation; written, and read also while a run goes on."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.run.run_lease import RunLease

METRICS = "metrics.jsonl"


class MetricsFile:
    """Appends JSON lines, flushed at once; only the main process has one.

    A new attempt puts a copy in the place of this file, so lines that a stale attempt still appends to the file that
    it has open are in no directory. Opening and writing raise Superseded where this attempt is stale.
    """

    def __init__(self, path: Path, lease: RunLease) -> None:
        self._lease, self._file = lease, path.open("a", encoding="utf-8")
        lease.check()

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line; NaN and infinity, which JSON does not have, become null."""
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        self._lease.check()
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further lines are a bug."""
        self._file.close()


@dataclass(frozen=True)
class Metrics:
    """Training and evaluation lines by step, in the order of the steps; `broken_lines` are line numbers from 1."""

    steps: dict[int, dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]
    broken_lines: list[int]


def read_metrics(file: Path) -> Metrics:
    """Read the file; a line that is not a JSON object with a step is skipped.

    A killed run may leave an incomplete last line, and one broken line must not cost the others. Of a step that was
    written twice, because the run resumed from an earlier checkpoint, the last line counts.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    broken_lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            broken_lines.append(number)
            continue
        if "loss" in entry:
            steps[entry["step"]] = entry
        if "eval_loss" in entry:
            evaluations[entry["step"]] = entry
    return Metrics(dict(sorted(steps.items())), dict(sorted(evaluations.items())), broken_lines)
