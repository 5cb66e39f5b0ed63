"""One form for every evaluation's result, so that pictures, comparisons and reports need to know only this.

A result is a folder with two files:

    metrics.json        flat: the facts (kind, model, dataset_name, dataset_split, rows, rows_sha256), every metric by
                        its name as a number, and `intervals`: its 95% interval [low, high] by the same name
    predictions.jsonl   a line a row, in the order of the data set: id, then what the kind of evaluation says; rows of
                        one `group` (the answers to one prompt) are no independent witnesses
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.io.errors import UserError
from isotune.io.files import replace_file

METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"
FACTS = ("kind", "model", "dataset_name", "dataset_split", "rows", "rows_sha256")
CLASSIFICATION, GENERATION = "classification", "generation"


@dataclass(frozen=True)
class Result:
    """An evaluation that was read back: `predictions` has one entry a row, each with an `id` of its own."""

    folder: Path
    facts: dict[str, Any]
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    predictions: list[dict[str, Any]]


def rows_digest(rows: Iterable[tuple[Any, str]]) -> str:
    """SHA-256 over (id, input text) of every row in order: two results may be paired where it is the same."""
    digest = hashlib.sha256()
    for row_id, text in rows:
        digest.update(json.dumps([row_id, text]).encode())
    return digest.hexdigest()


def write_result(
    folder: Path,
    facts: dict[str, Any],
    metrics: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    predictions: Sequence[dict[str, Any]],
) -> None:
    """Write both files, each renamed into place when whole; metrics.json is last, so it stands for the whole result.

    Raises:
        ValueError: a fact is missing, or a metric has the name of a fact.
    """
    missing = [name for name in FACTS if name not in facts]
    twice = sorted(set(facts) & set(metrics))
    if missing or twice:
        raise ValueError(f"facts missing: {missing}; names of both a fact and a metric: {twice}")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / PREDICTIONS, "".join(json.dumps(one) + "\n" for one in predictions))
    whole = {**facts, **metrics, "intervals": {name: list(pair) for name, pair in intervals.items()}}
    replace_file(folder / METRICS, json.dumps(whole, indent=2) + "\n")


def read_result(folder: Path) -> Result:
    """The result in `folder`, checked.

    Raises:
        UserError: a file is missing, truncated or broken, an id stands twice, or a number is none.
    """
    whole = _read_metrics(folder / METRICS)
    missing = [name for name in FACTS if name not in whole]
    if missing:
        raise UserError(f"{folder / METRICS}: it does not say {', '.join(missing)}: evaluate again with this version")
    predictions = _read_predictions(folder / PREDICTIONS)
    if whole.get("rows") != len(predictions):
        raise UserError(f"{folder / PREDICTIONS}: {len(predictions)} rows, {METRICS} says {whole.get('rows')}")
    intervals = whole.pop("intervals", {})
    if not isinstance(intervals, dict) or not all(_is_interval(pair) for pair in intervals.values()):
        raise UserError(f"{folder / METRICS}: intervals: not each of them is a pair of numbers")
    numbers = {n: float(v) for n, v in whole.items() if n not in FACTS and type(v) in (int, float)}
    return Result(
        folder=folder,
        facts={name: value for name, value in whole.items() if name not in numbers},
        metrics=numbers,
        intervals={name: (pair[0], pair[1]) for name, pair in intervals.items()},
        predictions=predictions,
    )


def find_results(run: Path) -> list[Path]:
    """The folders below `run`/eval that hold a whole result, by name."""
    return sorted(file.parent for file in run.glob(f"eval/*/{METRICS}"))


def _read_metrics(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no {METRICS}: this folder holds no finished evaluation") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no JSON object")
    return found


def _read_predictions(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    found: list[dict[str, Any]] = []
    seen: set[Any] = set()
    for number, line in enumerate(lines, start=1):
        try:
            one = json.loads(line)
        except ValueError:
            raise UserError(f"{file}: line {number} is no JSON: the file is truncated or broken") from None
        if not isinstance(one, dict) or "id" not in one:
            raise UserError(f"{file}: line {number} has no id")
        if one["id"] in seen:
            raise UserError(f"{file}: line {number}: id {one['id']!r} stands twice")
        if not all(_is_number(share) for share in one.get("probabilities") or ()):
            raise UserError(f"{file}: line {number}: a probability is not a finite number")
        seen.add(one["id"])
        found.append(one)
    return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_interval(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))
