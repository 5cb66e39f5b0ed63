"""metrics.jsonl: a line per `logging_steps` optimizer updates and one per evaluation; read while a run goes on, too."""

import contextlib
import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isotune.io.errors import UserError, as_user_error
from isotune.io.reading import Unreadable, open_file, parse_json
from isotune.io.run_files import MAX_LINES_BYTES, is_finite_number
from isotune.run.run_lease import RunLease

if TYPE_CHECKING:
    from isotune.run.step_lines import StepLines

METRICS = "metrics.jsonl"
CHUNK_LINES = 4096
# keys whose values are numbers, beside those that begin with PREFIXES; a value that is not finite is null
NUMBERS = frozenset({
    "epoch", "loss", "grad_norm", "learning_rate", "supervised_tokens", "input_tokens", "documents", "step_seconds",
    "tokens_per_second", "peak_memory_bytes", "peak_reserved_bytes", "accuracy", "f1_micro", "exact_match", "pearson",
    "skipped_steps", "out_of_memory_retries", "steps",
})  # fmt: skip
PREFIXES = ("eval_", "train_")


class MetricsFile:
    """Appends JSON lines, flushed at once; only the main process has one.

    A new attempt puts a copy in the place of this file, so lines that a stale attempt still appends to the file that
    it has open are in no directory. Opening and writing raise Superseded where this attempt is stale.
    """

    def __init__(self, path: Path, lease: RunLease) -> None:
        self._lease, self._path = lease, path
        self._file = path.open("ab", buffering=0)  # nothing is left to write when a full disk has ended the run
        lease.check()

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line; NaN and infinity, which JSON does not have, become null. UserError where it cannot be."""
        self._lease.check()
        left = memoryview((json.dumps(with_nulls(values)) + "\n").encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise as_user_error(error, self._path) or UserError(
                f"{self._path} cannot be written: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Close the file; further lines are a bug."""
        self._file.close()


def with_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null for NaN and infinity, which JSON does not have."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


@dataclass(frozen=True)
class Metrics:
    """Training and evaluation lines by step, in the order of the steps; `broken_lines` are line numbers from 1."""

    steps: "StepLines"
    evaluations: "StepLines"
    broken_lines: list[int]


def read_metrics(file: Path) -> Metrics:
    """Read the file; a line that is not a JSON object with a step is skipped.

    A killed run may leave an incomplete last line, and one broken line must not cost the others. Of a step that was
    written twice, because the run resumed from an earlier checkpoint, the last line counts. FileNotFoundError, or
    Unreadable where it is no regular file.
    """
    broken_lines: list[int] = []
    evaluations: list[dict[str, Any]] = []

    def training_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
        for number, entry in enumerate(_entries(lines), start=1):
            if entry is None:
                broken_lines.append(number)
                continue
            if "eval_loss" in entry:
                evaluations.append(_numbers_or_null(entry))
            if "loss" in entry:
                yield entry

    from isotune.run.step_lines import StepLines  # numpy, without which runs are listed at once

    with open_file(file, MAX_LINES_BYTES, file.parent) as lines:
        return Metrics(StepLines(training_lines(lines), _is_number), StepLines(evaluations), broken_lines)


def _entries(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """`read_line` of each line, some thousand at once where they are as this program writes them, without nulls."""
    lines = iter(lines)
    while chunk := list(islice(lines, CHUNK_LINES)):
        entries: Any = None
        if all(map(_is_flat, chunk)):
            with contextlib.suppress(ValueError, RecursionError):
                entries = json.loads(b"[" + b",".join(chunk) + b"]")
        if entries is None or len(entries) != len(chunk):
            yield from map(read_line, chunk)
        else:
            yield from map(_with_step, entries)


def _is_flat(line: bytes) -> bool:
    """Whether it looks like one object of plain values: where it is not, several are no longer as many values."""
    return line.startswith(b"{") and line.endswith(b"}\n") and line.count(b"{") == 1 == line.count(b"}")


def read_progress(file: Path) -> tuple[int, dict[int, dict[str, Any]]]:
    """The last step and the evaluations, without parsing every line; raises as `read_metrics`."""
    evaluations: dict[int, dict[str, Any]] = {}
    last_lines: deque[bytes] = deque(maxlen=8)  # some of them may be broken
    with open_file(file, MAX_LINES_BYTES, file.parent) as lines:
        for line in lines:
            last_lines.append(line)
            if b'"eval_loss"' in line and (entry := read_line(line)) is not None:
                evaluations[entry["step"]] = entry
    return max((entry["step"] for line in last_lines if (entry := read_line(line)) is not None), default=0), evaluations


def read_line(line: bytes) -> dict[str, Any] | None:
    """A line of the file, with null under NUMBERS where it has no finite number; None where it is broken."""
    try:
        entry = _with_step(parse_json(line.decode("utf-8")))
    except (Unreadable, UnicodeDecodeError):
        return None
    return entry and _numbers_or_null(entry)


def _with_step(entry: Any) -> dict[str, Any] | None:
    """A line's value, where it is an object with a step."""
    if type(entry) is dict and type(step := entry.get("step")) is int and 0 <= step <= sys.maxsize:
        return entry
    return None


def _is_number(key: str) -> bool:
    """Whether the values of a key are numbers, and null where they are not."""
    return key in NUMBERS or key.startswith(PREFIXES)


def _numbers_or_null(entry: dict[str, Any]) -> dict[str, Any]:
    for key, value in entry.items():
        if not is_finite_number(value) and _is_number(key):
            entry[key] = None
    return entry
