"""Read metrics.jsonl, also of a run that was killed or is still going on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


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

    Raises:
        OSError: the file cannot be read.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    broken_lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        entry = _parse(line)
        if entry is None:
            broken_lines.append(number)
            continue
        if "loss" in entry:
            steps[entry["step"]] = entry
        if "eval_loss" in entry:
            evaluations[entry["step"]] = entry
    return Metrics(dict(sorted(steps.items())), dict(sorted(evaluations.items())), broken_lines)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
