"""What the evaluations of one or several runs found, name by name: metrics, pictures, examples, and who is better."""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.evaluation.comparison.compare import Comparison, compare_runs
from isotune.evaluation.results import CLASSIFICATION, GENERATION, Result
from isotune.io.errors import UserError
from isotune.report.run_record import RunRecord
from isotune.report.wording import letter, number

TEXTS = "examples.jsonl"
EXAMPLES = 10
LONGEST_TEXT = 2_000
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Cell:
    """A metric's value with its interval, as text; both empty where a run lacks it."""

    value: str
    interval: str


@dataclass(frozen=True)
class MetricRow:
    """A metric of each run that was evaluated under this name."""

    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, what it shows in a sentence, and more of that where there is more."""

    uri: str
    description: str
    details: list[str]
    run: str


@dataclass(frozen=True)
class Answer:
    """What a run made of a row; `right` is None where nothing says so."""

    run: str
    text: str
    right: bool | None


@dataclass(frozen=True)
class Example:
    """A row of the data with what each run made of it."""

    id: str
    question: str
    reference: str
    answers: list[Answer]


@dataclass(frozen=True)
class Evaluation:
    """Everything under one name.

    Attributes:
        runs, letters: long and short names of the runs that have it, in the order of the columns.
        per_class: rows of the metrics of single classes.
        truth: what the examples call what is true.
        comparison: where several runs have it and their rows are the same; else `not_compared` says why.
    """

    name: str
    facts: str
    runs: list[str]
    letters: list[str]
    metrics: list[MetricRow]
    per_class: list[MetricRow]
    pictures: list[Picture]
    examples_title: str
    truth: str
    examples: list[Example]
    comparison: Comparison | None
    not_compared: str


def gather_evaluations(records: Sequence[RunRecord], notes: list[str]) -> list[Evaluation]:
    """Every evaluation that any of the runs has; what is broken is said in `notes`."""
    names = dict.fromkeys(result.folder.name for record in records for result in record.results)
    return [_evaluation(name, records, notes) for name in names]


def _evaluation(name: str, records: Sequence[RunRecord], notes: list[str]) -> Evaluation:
    several = len(records) > 1
    results: dict[str, Result] = {}
    letters = []
    for place, record in enumerate(records):
        found = [result for result in record.results if result.folder.name == name]
        if found:
            results[f"{letter(place)}: {record.name}" if several else record.name] = found[0]
            letters.append(letter(place))
    first = next(iter(results.values()))
    comparison, why_not = _compare(list(results.values()))
    metrics = list(dict.fromkeys(metric for result in results.values() for metric in result.metrics))
    title, examples = _examples(results)
    facts = first.facts
    rows = [MetricRow(metric, [_cell(result, metric) for result in results.values()]) for metric in metrics]
    return Evaluation(
        name=name,
        facts=f"{facts['kind']}, {len(first.predictions):,} rows of {facts['dataset_name']} ({facts['dataset_split']})"
        + "".join(_verdict(run if several else "", result) for run, result in results.items()),
        runs=list(results),
        letters=letters,
        metrics=[row for row in rows if "_class_" not in row.name],
        per_class=[row for row in rows if "_class_" in row.name],
        pictures=[one for run, result in results.items() for one in _pictures(run, result, notes)],
        examples_title=title,
        truth="Actual" if facts["kind"] == CLASSIFICATION else "Reference",
        examples=examples,
        comparison=comparison,
        not_compared=why_not,
    )


def _verdict(run: str, result: Result) -> str:
    """What an evaluation that was judged against chance was found to be; an alarm first."""
    if "verdict" not in result.facts:
        return ""
    alarm = f"ALARM, {result.facts['alarm']}: " if result.facts.get("alarm") else ""
    return f". {run and run + ': '}{alarm}{result.facts['verdict']}"


def _compare(results: list[Result]) -> tuple[Comparison | None, str]:
    if len(results) < 2:
        return None, ""
    try:
        return compare_runs([result.folder for result in results]), ""
    except UserError as mistake:
        return None, str(mistake)


def _cell(result: Result, metric: str) -> Cell:
    if metric not in result.metrics:
        return Cell("", "")
    interval = result.intervals.get(metric)
    return Cell(number(result.metrics[metric]), f"{number(interval[0])} to {number(interval[1])}" if interval else "")


def _pictures(run: str, result: Result, notes: list[str]) -> list[Picture]:
    found = []
    for file in sorted(result.folder.glob("*.png")):
        content = file.read_bytes()
        if content.startswith(_PNG):
            uri = "data:image/png;base64," + base64.b64encode(content).decode()
            description, *details = _words(file, result)
            found.append(Picture(uri, description, details, run))
        else:
            notes.append(f"{file} is left out: it is no PNG picture.")
    return found


def _words(file: Path, result: Result) -> list[str]:
    """What stands beside a picture in a file .txt: a sentence, then more; else what its name says."""
    beside = file.with_suffix(".txt")
    lines = beside.read_text(encoding="utf-8", errors="replace").splitlines() if beside.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return said or [f"{file.stem.replace('_', ' ').replace('-', ' ')}, of the evaluation {result.folder.name}"]


def _examples(results: dict[str, Result]) -> tuple[str, list[Example]]:
    first = next(iter(results.values()))
    if first.facts["kind"] == CLASSIFICATION:
        return "Most confident errors", [one for run, result in results.items() for one in _errors(run, result)]
    return "Answers beside their references", _side_by_side(results) if first.facts["kind"] == GENERATION else []


def _errors(run: str, result: Result) -> list[Example]:
    """The wrong rows of which the model was surest, the surest first."""
    texts = _texts(result.folder / TEXTS)
    wrong = []
    for row in result.predictions:
        shares, label = row.get("probabilities") or [], row.get("label")
        chosen = max(range(len(shares)), key=shares.__getitem__, default=None)
        if chosen is not None and chosen != label:
            wrong.append((-shares[chosen], chosen, row))
    wrong.sort(key=lambda one: one[0])
    return [
        Example(
            id=str(row["id"]),
            question=_cut(texts.get(row["id"])),
            reference=_class(row.get("label"), result),
            answers=[Answer(run, f"{_class(chosen, result)}, probability {-minus:.3f}", False)],
        )
        for minus, chosen, row in wrong[:EXAMPLES]
    ]


def _texts(file: Path) -> dict[Any, str]:
    """The texts of the rows worth reading by id; predictions hold none."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {row["id"]: row["text"] for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _class(label: Any, result: Result) -> str:
    names = result.facts.get("label_names")
    if isinstance(names, list) and isinstance(label, int) and 0 <= label < len(names):
        return str(names[label])
    return f"class {label}"


def _side_by_side(results: dict[str, Result]) -> list[Example]:
    """Rows with the answer of every run, those on which the runs disagree first, then those that are wrong."""
    by_id = {run: {row["id"]: row for row in result.predictions} for run, result in results.items()}
    first = next(iter(by_id.values()))

    def order(row_id: Any) -> tuple[bool, bool]:
        texts = {rows[row_id].get("text") for rows in by_id.values() if row_id in rows}
        return len(texts) == 1, all(_is_right(rows[row_id]) is True for rows in by_id.values() if row_id in rows)

    return [
        Example(
            id=str(row_id),
            question=_cut(first[row_id].get("prompt")),
            reference=_cut(first[row_id].get("reference")),
            answers=[
                Answer(run, _cut(rows[row_id].get("text")), _is_right(rows[row_id]))
                for run, rows in by_id.items()
                if row_id in rows
            ],
        )
        for row_id in sorted(first, key=order)[:EXAMPLES]
    ]


def _is_right(row: dict[str, Any]) -> bool | None:
    said = row.get("exact_match", row.get("match"))
    return None if said is None or not math.isfinite(said) else bool(said)


def _cut(text: Any) -> str:
    whole = "" if text is None else str(text)
    return whole if len(whole) <= LONGEST_TEXT else f"{whole[:LONGEST_TEXT]} … ({len(whole):,} characters)"
