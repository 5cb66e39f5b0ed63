"""A run's recipe, data, engine, machine and versions as tables with a column for each run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isotune.report.formatting import format_number
from isotune.report.run_record import RunRecord

ABSENT = "–"
SELF_TEST = "Self-test before the first step"


@dataclass(frozen=True)
class Row:
    """A named value of each run."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether the runs have different values."""
        return len(set(self.values)) > 1


@dataclass(frozen=True)
class Table:
    """Rows under a caption."""

    caption: str
    rows: list[Row]


def run_summary(record: RunRecord) -> list[tuple[str, str]]:
    """The names and values of a run's most important facts."""
    keys, in_effect = record.keys, _section(record.environment, "in_effect")
    facts = [("State", _state(record)), ("Model", keys.get("model_name_or_path")), ("Data", keys.get("dataset_name"))]
    trained, total = _number(in_effect, "trained_parameters"), _number(in_effect, "all_parameters")
    if total:
        facts.append(
            ("Trained", f"{keys.get('tune', '')}: {trained:,} of {total:,} parameters ({trained / total:.1%})")
        )
    if record.steps:
        last, line = next(reversed(record.steps.items()))
        facts.append(("Steps", f"{last:,}"))
        facts.append(
            ("Loss of the last step", format_number(line["loss"]) if line["loss"] is not None else "not finite")
        )
    losses = {step: value for step, line in record.evaluations.items() if (value := _number(line, "eval_loss"))}
    if losses:
        best = min(losses, key=losses.__getitem__)
        facts.append(("Lowest evaluation loss", f"{format_number(losses[best])} at step {best:,}"))
    tokens = sum(_number(line, "input_tokens") for line in record.steps.values())
    seconds = sum(_number(line, "step_seconds") for line in record.steps.values())
    if seconds:
        facts.append(("Time in steps", _duration(seconds)))
    if tokens:
        facts.append(("Tokens seen", f"{tokens:,}"))
    return [(name, str(value)) for name, value in facts if value]


def run_tables(records: Sequence[RunRecord]) -> list[Table]:
    """The groups of the recipe, the data, the engine in effect, the machine and the versions."""
    environments = [record.environment for record in records]
    titles = dict.fromkeys(title for record in records for title in record.recipe)
    tables = [_table(f"Recipe: {title}", [record.recipe.get(title, {}) for record in records]) for title in titles]
    for role, name in (("train", "training"), ("evaluation", "evaluation")):
        tables.append(_table(f"Data: {name}", [_data(environment, role) for environment in environments]))
    for caption, section in (("Engine in effect", "in_effect"), (SELF_TEST, "isolation")):
        tables.append(_table(caption, [_section(environment, section) for environment in environments]))
    machine = ("device", "device_name", "threads_per_process", "world_size", "git_commit", "command")
    selected = [{key: e[key] for key in machine if e.get(key) is not None} for e in environments]
    tables.append(_table("Machine and command", selected))
    tables.append(_table("Versions", [_section(environment, "versions") for environment in environments]))
    return [table for table in tables if table.rows]


def changed_tables(tables: Sequence[Table]) -> list[Table]:
    """The rows that differ between the runs, without the self-tests, which differ in rounding only."""
    compared = [table for table in tables if table.caption != SELF_TEST]
    changed = [Table(table.caption, [row for row in table.rows if row.differs]) for table in compared]
    return [table for table in changed if table.rows]


def _table(caption: str, columns: list[dict[str, Any]]) -> Table:
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [Row(name, [_text(column[name]) if name in column else ABSENT for column in columns]) for name in names]
    return Table(caption, rows)


def _state(record: RunRecord) -> str:
    status = record.status.get("status")
    message = record.status.get("message")
    return f"{status}: {message}" if status and message else str(status or "")


def _data(environment: dict[str, Any], role: str) -> dict[str, Any]:
    counts = _section(_section(environment, "data"), role)
    fingerprint = _section(environment, "data_fingerprints").get(role)
    return {**counts, "fingerprint": str(fingerprint)[:16]} if fingerprint else counts


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
