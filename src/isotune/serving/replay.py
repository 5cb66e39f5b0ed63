"""Before a model is served it predicts rows of its newest evaluation again: what is served is what was evaluated.

The rows are read as that evaluation read them, and known to be the same by their digest. They go through the code that
requests go through. How rows of each kind are compared is in `classification/replay.py` and `generation/replay.py`.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.evaluation.results import CLAIM, METRICS, Result, find_results, read_result
from isotune.io.errors import UserError
from isotune.io.reading import read_json_object

PASS_OVER = "--no_replay serves without"


@dataclass(frozen=True)
class Replayed:
    """How many stored predictions the model makes again."""

    folder: Path
    identical: int
    of: int
    first: Any = None  # id of the first row that differs
    largest: float | None = None  # difference of a probability or number, where there are any
    note: str = ""  # what was compared, where it is not the stored predictions themselves

    def check(self) -> None:
        """Raise UserError where a prediction differs."""
        if self.identical < self.of:
            size = "" if self.largest is None else f", the largest difference {self.largest:.2g}"
            raise UserError(
                f"{self.of - self.identical} of {self.of} predictions in {self.folder} are not what the model says now "
                f"(id {self.first!r} first{size}): evaluate it again on this device, or {PASS_OVER}"
            )

    def __str__(self) -> str:
        return f"{self.identical} of {self.of} identical"


@dataclass(frozen=True)
class Evaluated:
    """A stored result, and what decided it."""

    result: Result
    claim: dict[str, Any]

    def task_keys(self, kind: type) -> dict[str, Any]:
        """The keys of its task, but for the metrics."""
        known = kind.__dataclass_fields__.keys() - {"metrics"}
        return {key: value for key, value in self.claim.items() if key in known and value is not None}

    def no_rows(self, why: str) -> UserError:
        """The error of rows that cannot be had as they were."""
        return UserError(f"the rows of {self.result.folder} cannot be replayed ({why}): {PASS_OVER}")


def newest_evaluation(
    run: Path, kind: str, why_not: Callable[[Evaluated], str | None], made_by: str | None = None
) -> Evaluated:
    """The newest result in a run that can be replayed; UserError without one.

    `why_not` says of a result of this kind why it cannot be; `made_by` is the command that makes one (isotune eval).
    """
    why = ""
    for folder in sorted(find_results(run), key=lambda own: (own / METRICS).stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(OSError, ValueError):  # without a claim it is of an earlier version or a training run
            claim = read_json_object(folder / CLAIM)
            evaluated = Evaluated(read_result(folder), claim)
            if evaluated.result.facts["kind"] != kind:
                continue
            if (reason := why_not(evaluated)) is None:
                return evaluated
            why = why or f" ({folder.name}: {reason})"
    made_by = made_by or f"isotune eval {run}"
    raise UserError(f"{run} has no evaluation to replay{why}: {made_by} makes one, or {PASS_OVER}")


def spread(of: int, count: int) -> list[int]:
    """`count` numbers from 0 to `of` - 1, evenly spread; all where there are no more."""
    return [number * of // count for number in range(count)] if of > count else list(range(of))
