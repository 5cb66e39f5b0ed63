"""Read a run folder for the report, whatever state the run is in; missing and broken files become notes."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isotune.evaluation.results import Result, find_results, read_result
from isotune.io.errors import UserError
from isotune.run.metrics_reader import METRICS, Metrics, read_metrics

_KEY = re.compile(r"([A-Za-z_][\w.]*):")


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's files.

    Attributes:
        folder: RUN.
        recipe: the values of recipe.yaml by key, in the groups of that file by title.
        environment: environment.json; empty without the file.
        status: status.json; empty without the file.
        steps: the training lines of metrics.jsonl by step.
        evaluations: its evaluation lines by step.
        results: the evaluations in RUN/eval.
        notes: a sentence for each file that cannot be read.
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
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def keys(self) -> dict[str, Any]:
        """The recipe's values by key, without the groups."""
        return {key: value for group in self.recipe.values() for key, value in group.items()}


def read_record(run: str | Path) -> RunRecord:
    """Read a run in any state, or a folder that has evaluations only.

    Raises:
        UserError: the folder does not exist, or has no recipe, no metrics and no evaluation.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    result_folders = find_results(folder)
    if not ((folder / "recipe.yaml").is_file() or (folder / METRICS).is_file() or result_folders):
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml, no {METRICS} and no eval/NAME/metrics.json")
    notes: list[str] = []
    metrics = _read_metrics(folder / METRICS, notes)
    results = []
    for result_folder in result_folders:
        try:
            results.append(read_result(result_folder))
        except UserError as error:
            notes.append(f"An evaluation is left out: {error}.")
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


def _read_metrics(file: Path, notes: list[str]) -> Metrics:
    if not file.exists():
        return Metrics({}, {}, [])
    try:
        metrics = read_metrics(file)
    except OSError as error:
        notes.append(f"{file} cannot be read: {error.strerror}.")
        return Metrics({}, {}, [])
    if metrics.broken_lines:
        first, count = metrics.broken_lines[0], len(metrics.broken_lines)
        lines = f"line {first} cannot be read and is" if count == 1 else f"{count} lines from line {first} on are"
        notes.append(f"{file}: {lines} skipped; a killed run may leave an incomplete last line.")
    return metrics


def _read(file: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        values = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{file} cannot be read: {str(error).splitlines()[0]}.")
        return {}
    if not isinstance(values, dict):
        notes.append(f"{file} cannot be read: it has no keys.")
        return {}
    return values


def _recipe_groups(text: str) -> dict[str, dict[str, Any]]:
    """The values of a recipe by the comment line above them."""
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ValueError("it has no keys")
    groups: dict[str, dict[str, Any]] = {}
    title = "Recipe"
    ungrouped = dict(values)
    for line in text.splitlines():
        if line.startswith("# "):
            title = line[2:].strip()
        elif (key := _KEY.match(line)) and key[1] in ungrouped:
            groups.setdefault(title, {})[key[1]] = ungrouped.pop(key[1])
    if ungrouped:
        groups.setdefault("Other keys", {}).update(ungrouped)
    return groups
