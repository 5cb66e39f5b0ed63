"""What a run folder says, read for a person: whatever state the run is in, and with what is missing or broken named."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isotune.evaluation.results import Result, find_results, read_result
from isotune.io.errors import UserError
from isotune.report.metrics_lines import METRICS, MetricsLines, read_metrics

_KEY = re.compile(r"([A-Za-z_][\w.]*):")


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it.

    Attributes:
        folder: RUN.
        recipe: group by group as recipe.yaml has them: the title, and values by key.
        environment: environment.json; empty where there is none.
        status: status.json; empty where there is none.
        steps: the training lines of metrics.jsonl by step; of a step that was written twice the last.
        evaluations: the evaluation lines likewise.
        results: what RUN/eval holds.
        notes: what could not be read, in sentences.
    """

    folder: Path
    recipe: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    status: dict[str, Any]
    steps: dict[int, dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]
    results: list[Result]
    notes: list[str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def keys(self) -> dict[str, Any]:
        """The recipe's values by key, without the groups."""
        return {key: value for group in self.recipe.values() for key, value in group.items()}


def read_record(run: str | Path) -> RunRecord:
    """Read a run that trains, has trained or was stopped, or a folder that holds evaluations only.

    Raises:
        UserError: the folder is none, or holds neither a recipe nor metrics nor an evaluation.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    evaluated = find_results(folder)
    if not ((folder / "recipe.yaml").is_file() or (folder / METRICS).is_file() or evaluated):
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml, no {METRICS} and no eval/NAME/metrics.json")
    notes: list[str] = []
    metrics = _read_metrics(folder / METRICS, notes)
    results = []
    for result in evaluated:
        try:
            results.append(read_result(result))
        except UserError as broken:
            notes.append(f"An evaluation is left out: {broken}.")
    return RunRecord(
        folder=folder,
        recipe=_read(folder / "recipe.yaml", _recipe_groups, notes),
        environment=_read(folder / "environment.json", json.loads, notes),
        status=_read(folder / "status.json", json.loads, notes),
        steps=metrics.steps,
        evaluations=metrics.evaluations,
        results=results,
        notes=notes,
    )


def _read_metrics(file: Path, notes: list[str]) -> MetricsLines:
    """The lines of a run that has any; what is no line is said in `notes`."""
    if not file.exists():
        return MetricsLines({}, {}, [])
    try:
        found = read_metrics(file)
    except OSError as error:
        notes.append(f"{file} cannot be read: {error.strerror}.")
        return MetricsLines({}, {}, [])
    if found.broken:
        first, more = found.broken[0], len(found.broken) - 1
        where = f"line {first}" if not more else f"{more + 1} lines, the first of them {first},"
        notes.append(f"{file}: {where} cannot be read and is passed over; a run that was killed may cut its last line.")
    return found


def _read(file: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{file} cannot be read: {str(error).splitlines()[0]}.")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{file} cannot be read: it holds no keys.")
        return {}
    return found


def _recipe_groups(text: str) -> dict[str, dict[str, Any]]:
    """The values of a recipe below the comments that stand over them."""
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no keys")
    groups: dict[str, dict[str, Any]] = {}
    title = "Recipe"
    left = dict(values)
    for line in text.splitlines():
        if line.startswith("# "):
            title = line[2:].strip()
        elif (key := _KEY.match(line)) and key[1] in left:
            groups.setdefault(title, {})[key[1]] = left.pop(key[1])
    if left:
        groups.setdefault("Other keys", {}).update(left)
    return groups
