"""The lines of metrics.jsonl as whoever draws or tells a run needs them, whatever state the run left the file in."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class MetricsLines:
    """Training and evaluation lines by step, in its order, and the numbers of lines that are none, from 1."""

    steps: dict[int, dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]
    broken: list[int]


def read_metrics(file: Path) -> MetricsLines:
    """Read the file; a line that is no JSON object with a step is passed over.

    The last line of a killed run may be cut off, and one bad line must not cost the others. A step that was written
    twice, because a killed run resumed before it, counts as it was written last.

    Raises:
        OSError: the file cannot be read.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    broken = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        entry = _entry(line)
        if entry is None:
            broken.append(number)
            continue
        if "loss" in entry:
            steps[entry["step"]] = entry
        if "eval_loss" in entry:
            evaluations[entry["step"]] = entry
    return MetricsLines(dict(sorted(steps.items())), dict(sorted(evaluations.items())), broken)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
