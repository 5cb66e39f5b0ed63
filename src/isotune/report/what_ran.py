"""What ran, as tables with a column for each run: what differs between them first, then everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isotune.report.run_record import RunRecord
from isotune.report.wording import number

ABSENT = "–"
SELF_TEST = "Self-test before the first step"


@dataclass(frozen=True)
class Row:
    """A named value of each run."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether the runs disagree."""
        return len(set(self.values)) > 1


@dataclass(frozen=True)
class Table:
    """Rows under a caption."""

    caption: str
    rows: list[Row]


def summary(record: RunRecord) -> list[tuple[str, str]]:
    """The few facts of a run that a reader looks for first."""
    keys, found = record.keys, _part(record.environment, "in_effect")
    facts = [("State", _state(record)), ("Model", keys.get("model_name_or_path")), ("Data", keys.get("dataset_name"))]
    trained, whole = _amount(found, "trained_parameters"), _amount(found, "all_parameters")
    if whole:
        facts.append(
            ("Trained", f"{keys.get('tune', '')}: {trained:,} of {whole:,} parameters ({trained / whole:.1%})")
        )
    if record.steps:
        last, line = next(reversed(record.steps.items()))
        facts.append(("Steps", f"{last:,}"))
        facts.append(("Loss of the last step", number(line["loss"]) if line["loss"] is not None else "not finite"))
    losses = {step: value for step, line in record.evaluations.items() if (value := _amount(line, "eval_loss"))}
    if losses:
        best = min(losses, key=losses.__getitem__)
        facts.append(("Lowest evaluation loss", f"{number(losses[best])} at step {best:,}"))
    tokens = sum(_amount(line, "input_tokens") for line in record.steps.values())
    seconds = sum(_amount(line, "step_seconds") for line in record.steps.values())
    if seconds:
        facts.append(("Time in steps", _duration(seconds)))
    if tokens:
        facts.append(("Tokens seen", f"{tokens:,}"))
    return [(name, str(value)) for name, value in facts if value]


def tables(records: Sequence[RunRecord]) -> list[Table]:
    """The recipe group by group, the data, the engine in effect, the machine and the versions."""
    environments = [record.environment for record in records]
    titles = dict.fromkeys(title for record in records for title in record.recipe)
    found = [
        _table(f"Recipe: {title}", [_readable(record.recipe.get(title, {})) for record in records]) for title in titles
    ]
    for role in ("train", "evaluation"):
        data = [_data(of, role) for of in environments]
        found.append(_table(f"Data: {'training' if role == 'train' else role}", data))
    found.append(_table("Engine in effect", [_readable(_part(of, "in_effect")) for of in environments]))
    found.append(_table(SELF_TEST, [_readable(_part(of, "isolation")) for of in environments]))
    machine = ("device", "device_name", "threads_per_process", "world_size", "git_commit", "command")
    found.append(_table("Machine and command", [_readable(_only(of, machine)) for of in environments]))
    found.append(_table("Versions", [_readable(_part(of, "versions")) for of in environments]))
    return [table for table in found if table.rows]


def differences(every: Sequence[Table]) -> list[Table]:
    """The rows on which the runs disagree, table by table; how the self-tests' rounding differs tells nothing."""
    tables = [table for table in every if table.caption != SELF_TEST]
    different = [Table(table.caption, [row for row in table.rows if row.differs]) for table in tables]
    return [table for table in different if table.rows]


def _table(caption: str, columns: list[dict[str, str]]) -> Table:
    names = dict.fromkeys(name for column in columns for name in column)
    return Table(caption, [Row(name, [column.get(name, ABSENT) for column in columns]) for name in names])


def _state(record: RunRecord) -> str:
    said = record.status.get("status")
    message = record.status.get("message")
    return f"{said}: {message}" if said and message else str(said or "")


def _data(environment: dict[str, Any], role: str) -> dict[str, str]:
    found = _readable(_part(_part(environment, "data"), role))
    fingerprint = _part(environment, "data_fingerprints").get(role)
    return {**found, "fingerprint": str(fingerprint)[:16]} if fingerprint else found


def _part(of: dict[str, Any], name: str) -> dict[str, Any]:
    """A mapping within a mapping; empty where a file says something else."""
    found = of.get(name)
    return found if isinstance(found, dict) else {}


def _amount(line: dict[str, Any], name: str) -> float:
    """A number of a line; 0 where it is absent or none."""
    found = line.get(name)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else 0


def _only(of: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: of[name] for name in names if of.get(name) is not None}


def _readable(values: dict[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items()) or ABSENT
    if isinstance(value, list):
        # a command is typed with spaces; other lists are enumerations
        return (" " if all(isinstance(one, str) for one in value) else ", ").join(map(_text, value)) or ABSENT
    return f"{value:.6g}" if isinstance(value, float) else (f"{value:,}" if isinstance(value, int) else str(value))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
