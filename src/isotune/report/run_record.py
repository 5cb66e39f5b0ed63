"""Read a run folder in any state, and show its recipe, data, engine, machine and versions as tables."""

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.config.mixture import mixture_name
from isotune.config.recipes import project_of, task_of
from isotune.evaluation.results import Result, find_results, read_result, stray_results
from isotune.io.errors import UserError
from isotune.io.reading import MAX_YAML_BYTES, Unreadable, read_text
from isotune.io.run_files import ENVIRONMENT, RECIPE, SCRIPT, STATUS, read_environment, read_status, recipe_values
from isotune.report.formatting import format_number
from isotune.run.metrics_file import METRICS, Metrics, read_metrics
from isotune.run.step_lines import StepLines, steps_in_words

ABSENT = "–"
BY_DEFAULT = "Arguments by default"  # of a script: a group of its recipe.yaml
SELF_TEST = "Self-test before the first step"
_KEY = re.compile(r"([A-Za-z_][\w.]*):")

Tables = dict[str, dict[str, list[str]]]  # by caption the rows by name, with a value of each run


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's files; what is missing or broken is empty."""

    folder: Path
    recipe: dict[str, dict[str, Any]]  # the values by key, in the groups of recipe.yaml by title
    environment: dict[str, Any]
    status: dict[str, Any]
    steps: StepLines  # lines of metrics.jsonl by step
    evaluations: StepLines
    results: list[Result]  # the evaluations in RUN/eval
    notes: list[str]  # a sentence for each file that cannot be read

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def keys(self) -> dict[str, Any]:
        """The recipe's values by key, without the groups."""
        return {key: value for group in self.recipe.values() for key, value in group.items()}

    @property
    def example(self) -> list[tuple[str, bool]]:
        """The document that was shown before the first step, in segments: text, and whether it is learnt."""
        segments = _section(self.environment, "example").get("segments")
        found = segments if isinstance(segments, list) else []
        return [
            (str(segment[0]), bool(segment[1])) for segment in found if isinstance(segment, list) and len(segment) == 2
        ]

    @property
    def augmented(self) -> dict[str, str]:
        """A training text before and after it was augmented, `text` and `augmented`; empty where none was."""
        example = _section(_section(_counts(self.environment, "train"), "augmented"), "example")
        return {name: str(example[name]) for name in ("text", "augmented") if {"text", "augmented"} <= example.keys()}


def read_record(run: str | Path) -> RunRecord:
    """Read a run in any state, or a folder that has evaluations only; UserError if it is neither."""
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    result_folders = find_results(folder)
    if not ((folder / RECIPE).is_file() or (folder / METRICS).is_file() or result_folders):
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml, no {METRICS} and no eval/NAME/metrics.json")
    notes = [f"An evaluation is left out: {sentence}." for sentence in stray_results(folder)]
    metrics = _read_metrics(folder / METRICS, notes)
    results = []
    for result_folder in result_folders:
        try:
            results.append(read_result(result_folder))
        except UserError as error:
            notes.append(f"An evaluation is left out: {error}.")
    recipe = _read(folder, RECIPE, _recipe_groups, notes)
    environment = _read(folder, ENVIRONMENT, read_environment, notes)
    status = _read(folder, STATUS, read_status, notes)
    return RunRecord(folder, recipe, environment, status, metrics.steps, metrics.evaluations, results, notes)


def run_summary(record: RunRecord) -> list[tuple[str, str]]:
    """The names and values of a run's most important facts."""
    keys, in_effect, status = record.keys, _section(record.environment, "in_effect"), record.status
    state = ": ".join(str(part) for part in (status.get("status"), status.get("message")) if part)
    facts = {"State": state if status.get("status") else "", "Model": keys.get("model_name_or_path")}
    facts["Data"] = mixture_name(keys["dataset_mixture"]) if "dataset_mixture" in keys else keys.get("dataset_name")
    trained, total = _number(in_effect, "trained_parameters"), _number(in_effect, "all_parameters")
    if total:
        facts["Trained"] = f"{keys.get('tune', '')}: {trained:,} of {total:,} parameters ({trained / total:.1%})"
    if record.steps:
        last, loss = int(record.steps.steps[-1]), float(record.steps.column("loss")[-1])
        facts["Steps"] = f"{last:,}"
        facts[f"Loss of the last {steps_in_words(record.steps, -1)}"] = (
            format_number(loss) if math.isfinite(loss) else "not finite"
        )
    losses = {step: value for step, line in record.evaluations.items() if (value := _number(line, "eval_loss"))}
    if losses:
        best = min(losses, key=losses.__getitem__)
        facts["Lowest evaluation loss"] = f"{format_number(losses[best])} at step {best:,}"
    seconds, tokens = (record.steps.total(key) for key in ("step_seconds", "input_tokens"))
    facts |= {"Time in steps": _duration(seconds) if seconds else "", "Tokens seen": f"{tokens:,}" if tokens else ""}
    # a project's runs, and those of scripts, read data in ways of their own
    if (record.folder / "model").is_dir() and SCRIPT not in keys and project_of(keys) is None:
        run = shlex.quote(str(record.folder))
        facts["Page and API"] = f"isotune serve {run}"
        if task_of(keys) == "sft":
            merge = "" if keys.get("tune", "full") == "full" else " --merge"
            facts["Files for vLLM and Ollama"] = f"isotune export {run}{merge}"
    return [(name, str(value)) for name, value in facts.items() if value]


def run_tables(records: Sequence[RunRecord]) -> Tables:
    """The groups of the recipe, the data, the engine in effect, the machine and the versions."""
    environments = [record.environment for record in records]
    titles = dict.fromkeys(title for record in records for title in record.recipe)
    machine = ("device", "device_name", "threads_per_process", "world_size", "git_commit", "command")
    columns = {f"Recipe: {title}": [record.recipe.get(title, {}) for record in records] for title in titles}
    columns["Data: training"] = [_data(each, "train") for each in environments]
    columns["Data: evaluation"] = [_data(each, "evaluation") for each in environments]
    columns["Engine in effect"] = [_section(each, "in_effect") for each in environments]
    columns[SELF_TEST] = [_section(each, "isolation") for each in environments]
    columns["Machine and command"] = [
        {key: each[key] for key in machine if each.get(key) is not None} for each in environments
    ]
    columns["Versions"] = [_section(each, "versions") for each in environments]
    tables: Tables = {}
    for caption, values in columns.items():
        names = dict.fromkeys(name for column in values for name in column)
        rows = {name: [_text(column[name]) if name in column else ABSENT for column in values] for name in names}
        tables |= {caption: rows} if rows else {}
    return tables


def differ(values: Sequence[str]) -> bool:
    """Whether the runs have different values."""
    return len(set(values)) > 1


def changed_tables(tables: Tables) -> Tables:
    """The rows that differ between the runs, without the self-tests, which differ in rounding only."""
    changed: Tables = {}
    for caption, rows in tables.items():
        different = {name: values for name, values in rows.items() if differ(values) and caption != SELF_TEST}
        changed |= {caption: different} if different else {}
    return changed


def _read_metrics(file: Path, notes: list[str]) -> Metrics:
    metrics = Metrics(StepLines(), StepLines(), [])
    try:
        metrics = read_metrics(file)
    except FileNotFoundError:
        pass
    except Unreadable as reason:
        notes.append(f"{file} cannot be read: {reason}.")
    if metrics.broken_lines:
        first, count = metrics.broken_lines[0], len(metrics.broken_lines)
        lines = f"line {first} cannot be read and is" if count == 1 else f"{count} lines from line {first} on are"
        notes.append(f"{file}: {lines} skipped; a killed run may leave an incomplete last line.")
    return metrics


def _read(folder: Path, name: str, read: Callable[[Path], dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """A file of the run by its reader, which takes the run's folder."""
    try:
        return read(folder)
    except FileNotFoundError:
        return {}
    except Unreadable as reason:
        notes.append(f"{folder / name} cannot be read: {reason}.")
        return {}


def _recipe_groups(run: Path) -> dict[str, dict[str, Any]]:
    """The values of a recipe by the comment line above them."""
    text = read_text(run / RECIPE, MAX_YAML_BYTES, root=run)
    values = recipe_values(text)
    groups: dict[str, dict[str, Any]] = {}
    title, ungrouped = "Recipe", dict(values)
    for line in text.splitlines():
        if line.startswith("# "):
            title = line[2:].strip()
        elif (key := _KEY.match(line)) and key[1] in ungrouped:
            groups.setdefault(title, {})[key[1]] = ungrouped.pop(key[1])
    if ungrouped:
        groups.setdefault("Other keys", {}).update(ungrouped)
    return groups


def _data(environment: dict[str, Any], role: str) -> dict[str, Any]:
    counts = _counts(environment, role)
    if made := _section(counts, "augmented"):
        counts = {**counts, "augmented": {name: value for name, value in made.items() if name != "example"}}
    fingerprint = _section(environment, "data_fingerprints").get(role)
    rows = {name.replace("_", " "): value for name, value in _by_reason(counts).items()}
    return {**rows, "fingerprint": str(fingerprint)[:16]} if fingerprint else rows


def _by_reason(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts with a row for each of those that one key holds, such as rows left out by reason, or classes."""
    rows: dict[str, Any] = {}
    for name, value in counts.items():
        if isinstance(value, dict) and value and all(type(count) in (int, float) for count in value.values()):
            rows |= {f"{name}: {reason}": count for reason, count in value.items()}
        else:
            rows[name] = value
    return rows


def _counts(environment: dict[str, Any], role: str) -> dict[str, Any]:
    """What preparation counted of the training or evaluation data."""
    return _section(_section(environment, "data"), role)


def _section(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    """A mapping within a mapping; empty where the file has something else there."""
    section = mapping.get(name)
    return section if isinstance(section, dict) else {}


def _number(line: dict[str, Any], name: str) -> float:
    """A number of a line; 0 where it is absent or not a number."""
    value = line.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items()) or ABSENT
    if isinstance(value, list):
        # the words of a command are separated by spaces, other items by commas
        return (" " if all(isinstance(item, str) for item in value) else ", ").join(map(_text, value)) or ABSENT
    return f"{value:.6g}" if isinstance(value, float) else (f"{value:,}" if isinstance(value, int) else str(value))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
